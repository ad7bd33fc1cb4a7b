"""Keys, hosts, headers and log lines."""

import json
import re

import pytest
from serving import KEY, ask, start


@pytest.mark.parametrize("authorization", [None, "", KEY, f"Basic {KEY}", "Bearer ", f"Bearer {KEY}x", f"bearer{KEY}"])
@pytest.mark.parametrize("path", ["/", "/docs", "/metrics", "/v1/models", "/nowhere", "/openapi.json"])
def test_without_the_key(several, path, authorization):
    status, headers, content = ask(
        several, "GET", path, headers={"Authorization": authorization} if authorization else {}
    )
    assert status == 401
    assert headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in content.decode()


def test_with_the_key(several):
    assert ask(several, "GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
    assert ask(several, "GET", "/health", headers={"Host": "10.1.2.3"})[0] == 200  # as a load balancer asks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:9", 200), ("[::1]:80", 200), ("evil.example", 400),
     ("localhost.evil.example", 400), ("", 400)],
)  # fmt: skip
def test_hosts_of_a_loopback_server(port, host, status):
    assert ask(port, "GET", "/v1/models", headers={"Host": host})[0] == status


def test_headers(port):
    for path in ("/", "/docs", "/health", "/nowhere"):
        _, headers, _ = ask(port, "GET", path)
        assert "script-src 'self';" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Access-Control-Allow-Origin"] is None
        assert re.fullmatch("[0-9a-f]{16}", headers["X-Request-Id"])
    assert ask(port, "GET", "/health", headers={"X-Request-Id": "a-1"})[1]["X-Request-Id"] == "a-1"
    assert ask(port, "GET", "/health", headers={"X-Request-Id": "a b"})[1]["X-Request-Id"] != "a b"


@pytest.mark.slow
def test_origins_hosts_and_the_log(folder, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "serve.yaml").write_text(
        json.dumps({"allow_origins": ["https://a.example"], "allowed_hosts": ["*.b.example"], "host": "0.0.0.0"})
    )
    process, port = start(folder, tmp_path / "serve.yaml", "--api-key-file", tmp_path / "key")
    try:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Host": "x.b.example",
                 "Access-Control-Request-Headers": "authorization"}  # fmt: skip
        status, headers, _ = ask(port, "OPTIONS", "/score", headers=asked)  # a browser sends no key with this request
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://a.example")
        assert ask(port, "OPTIONS", "/score", headers=asked | {"Origin": "https://c.example"})[0] == 400
        known = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "X-Request-Id": "mine"}
        body = {"inputs": ["paris is [MASK]"]}
        assert ask(port, "POST", "/score", body, headers=known | {"Host": "x.b.example"})[0] == 200
        assert ask(port, "POST", "/score", body, headers=known | {"Host": "b.example"})[0] == 400
    finally:
        process.terminate()
    lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    (entry,) = [line for line in lines if line.get("id") == "mine" and line["status"] == 200]
    assert entry["message"] == "request"
    assert (entry["method"], entry["route"]) == ("POST", "/score")
    assert entry["seconds"] > 0
    assert "paris" not in json.dumps(lines)
    assert not any("asks for no key" in line["message"] for line in lines)


def test_a_log_that_nobody_reads_stops_nothing(several):
    """Nobody reads stderr of the servers of these tests. A pipe holds 64 KB, which is about 400 lines."""
    for _ in range(600):
        assert ask(several, "GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
