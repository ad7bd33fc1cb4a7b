"""The server's middleware. It checks the key and the host, adds headers, and counts and logs requests."""

import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from bert_jax.inference.server.limits import Refused

logger = logging.getLogger(__name__)

OPEN = "/health"
"""The path that requires neither a key nor an allowed host.

Load balancers send no key, and they send the server's IP address as the host.
"""
QUIET = (OPEN, "/metrics")
"""Paths whose requests are not logged, because monitoring systems poll them."""
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
"""Headers that are added to all responses.

They allow pages to load scripts and styles only from this server, and they do not allow any site to embed the pages.
"""


class Guard:
    """Middleware that checks, counts and logs requests.

    The log contains one line per request. The line includes the request id but no text from the request.

    Args:
        app: The application.
        api_key: The key that clients must send as `Authorization: Bearer …`. If empty, no key is required.
        check_room: A function that is called with the number of POST requests in progress and raises `Refused` if there
            are too many. The new request is then refused before its body is read, because an overloaded server should
            not spend time on reading bodies.
        allowed_hosts: Accepted values of the `Host` header; `*.example.com` matches all subdomains. If empty, any value
            is accepted.
        registry: The registry in which the metrics are registered.
    """

    def __init__(
        self,
        app: Any,
        *,
        api_key: str,
        allowed_hosts: Sequence[str],
        registry: CollectorRegistry,
        check_room: Callable[[int], None],
    ):
        self.app, self._check_room = app, check_room
        self._inside = 0
        self._authorization = f"Bearer {api_key}".encode() if api_key else b""
        self._hosts = [host.lower() for host in allowed_hosts]
        self._requests = Counter("bert_jax_requests", "Number of requests.", ["route", "status"], registry=registry)
        self._seconds = Histogram("bert_jax_request_seconds", "Seconds per request.", ["route"], registry=registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request to the application if the request has the required key and an allowed host."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, post = time.perf_counter(), 499, scope["method"] == "POST"
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if re.fullmatch(rb"[\w.-]{1,64}", given) else secrets.token_hex(8).encode()

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS, (b"x-request-id", request_id)]
            await send(message)

        try:
            try:
                self._check(scope["path"], headers)
                if post:
                    self._check_room(self._inside)
                self._inside += post
                try:
                    await self.app(scope, receive, sending)
                finally:
                    self._inside -= post
            except Refused as refused:
                await refused.response(scope["path"])(scope, receive, sending)
            except Exception as error:  # the error's message could quote a text
                logger.error("a request failed", extra={"fields": {"id": request_id.decode(), "error": _place(error)}})
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self._requests.labels(route, status).inc()
            self._seconds.labels(route).observe(seconds)
            if scope["path"] not in QUIET:
                fields = {"id": request_id.decode(), "method": scope["method"], "route": route, "status": status}
                logger.info("request", extra={"fields": fields | {"seconds": round(seconds, 6)}})

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if path == OPEN:
            return
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self._hosts and not any(
            host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self._hosts
        ):
            raise Refused(400, "host", "The header Host names another server; see allowed_hosts.")
        given = headers.get(b"authorization", b"")
        if self._authorization and not hmac.compare_digest(given, self._authorization):
            raise Refused(401, "invalid_api_key", "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})


def _place(error: Exception) -> str:
    """Returns the type of an exception and the line of code that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{where}"
