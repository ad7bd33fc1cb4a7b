"""What a connection can take from the server: lies about lengths, headers without end, and clients that hang."""

import contextlib
import json
import resource
import socket
import time

import pytest
from serving import ask, start

from bert_jax.inference.server import connections

HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"inputs": ["a [MASK] day"]}).encode()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def answer(client):
    """What a server sends until it closes the connection or sends nothing for two seconds."""
    client.settimeout(2)
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except (TimeoutError, ConnectionResetError):
        pass
    return received


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, b"200"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), b"200"),
        (HEAD + b"Content-Length: 5\r\n\r\n" + BODY, b"400"),  # the rest is no request
        (HEAD + b"Content-Length: -1\r\n\r\n" + BODY, b"400"),
        (HEAD + b"Content-Length: 9999999999999999999999\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 20\r\nContent-Length: 21\r\n\r\n" + BODY, b"400"),
        (HEAD + b"Content-Length: 20\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY, b"400"),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", b"415"),
        (b"\x16\x03\x01\x02\x00", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 10**6 + b"\r\n\r\n", b"400"),
    ],
)
def test_what_is_sent_is_answered(port, sent, status):
    with connect(port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        received = answer(client)
    assert received.startswith(b"HTTP/1.1 " + status) or (len(sent) > 10**6 and not received), received
    assert ask(port, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000,  # requests without reading the answers
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 50_000,  # trailers
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 50_000,
    ],
)
def test_too_many_requests_or_headers_at_once(port, sent):
    with connect(port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        assert answer(client).count(b"HTTP/1.1 200") < 20
        assert answer_now(client) == b""
    assert ask(port, "GET", "/health")[0] == 200


def test_chunks_without_end(port):
    """The request is refused, and the connection is closed soon after."""
    with connect(port) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        with pytest.raises(ConnectionError):
            client.sendall(chunk * 200)
    assert ask(port, "GET", "/health")[0] == 200


@pytest.mark.slow
def test_who_hangs_is_left(folder, tmp_path):
    """Slow headers, a refused body that does not end, and answers that are not read."""
    process, port = start(folder, *_config(tmp_path, timeout=3.0))
    try:
        slow, refused, deaf = connect(port), connect(port), connect(port)
        refused.sendall(HEAD.replace(b"json", b"text") + b"Content-Length: 99\r\n\r\n")
        assert refused.recv(65536).startswith(b"HTTP/1.1 415")
        body = json.dumps({"inputs": ["a [MASK] day"] * 900, "parameters": {"top_k": 20}}).encode()
        for _ in range(4):
            deaf.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        slow.sendall(b"GET /health HTTP/1.1\r\nA: ")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 30:
                slow.sendall(b"a")
                time.sleep(0.3)
        assert time.monotonic() - began > connections.HEADER_SECONDS - 2
        assert time.monotonic() - began < connections.HEADER_SECONDS + 3
        answer(refused)
        assert answer_now(refused) == b""
        assert ask(port, "GET", "/health")[0] == 200
    finally:
        process.kill()


@pytest.mark.slow
def test_many_idle_connections(folder, tmp_path):
    """Those that are idle longest give way, and other clients notice nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    process, port = start(folder, *_config(tmp_path, max_connections=64))
    try:
        idle = [connect(port) for _ in range(500)]
        for _ in range(20):
            assert ask(port, "POST", "/score", BODY)[0] == 200
        closed = sum(answer_now(client) == b"" for client in idle)
        assert closed >= 500 - 64
    finally:
        process.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def answer_now(client):
    """What has arrived: nothing (None), the end of the connection (b""), or data."""
    client.setblocking(False)
    try:
        return client.recv(100)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


def _config(tmp_path, **settings):
    (tmp_path / "serve.yaml").write_text(json.dumps(settings))
    return (tmp_path / "serve.yaml",)
