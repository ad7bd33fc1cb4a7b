"""Real servers in processes of their own, and requests to them over sockets."""

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

KEY = "a-key-of-the-tests"
STARTED_WITHIN = 240
"""Seconds after which a server that is not ready is killed."""
WORDS = [
    "paris",
    "is",
    "the",
    "of",
    "france",
    "today",
    "a",
    "day",
    "city",
    "capital",
    "new",
    "good",
    "!",
    ".",
    "?",
    "she",
    "he",
    "went",
    "home",
    "and",
    "then",
]


def start(*arguments, wait=True, **environment):
    """A server at a free port: its process and port."""
    command = [sys.executable, "-m", "bert_jax.cli", "serve", *map(str, arguments), "--port", "0"]
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | flags | environment)
    limit = threading.Timer(STARTED_WITHIN, process.kill)
    limit.start()
    line = process.stderr.readline()
    try:
        port = int(re.search(r"http://[0-9.]+:(\d+) answers", line)[1])
        while wait and ask(port, "GET", "/health")[0] != 200:
            time.sleep(0.1)
    except (TypeError, OSError, http.client.HTTPException):
        process.kill()
        pytest.fail(f"the server has not started within {STARTED_WITHIN} s: {line}{process.stderr.read()}")
    finally:
        limit.cancel()
    return process, port


def ask(port, method, path, body=None, headers=None, timeout=60):
    """Status, headers and content of an answer; a body that is no text or bytes goes as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    if body is not None and not isinstance(body, str | bytes):
        body = json.dumps(body)
    try:
        connection.request(method, path, body, headers or {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, answer.headers, content
    finally:
        connection.close()


def post(port, path, body, **options):
    status, _, content = ask(port, "POST", path, body, **options)
    return status, json.loads(content)


def same(answer, expected):
    """JSON with scores to 1e-5."""
    if isinstance(expected, float):
        return answer == pytest.approx(expected, abs=1e-5)
    if isinstance(expected, list):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(same(answer[key], expected[key]) for key in expected)
    return answer == expected
