"""Limits the resources that a connection can use before a request reaches the application and after the response.

`uvicorn` itself closes a connection if the client sends nothing for five seconds after a response, and it stops
receiving data while a body is waiting to be read. This module limits the number of open connections, the size of
headers, and the time for receiving headers. It also limits how much data a client may send after its request is refused
and how long it may take to read the response.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from bert_jax.inference.server.limits import Limits

HEADER_SECONDS = 10.0
"""Time limit, in seconds, for receiving the headers of a request and, after a refusal, the rest of the body."""
MAX_HEADERS = 2**16
"""Maximum size of a request's headers, in bytes."""
MAX_PIPELINED = 8
"""Maximum number of requests that a client may send before it receives the response to the first one."""


def protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """Returns a class to pass as the `http` argument of `uvicorn.Config`. All its connections share `limits`."""
    return type("Connection", (_Connection,), {"limits": limits, "idle": {}})


class _Connection(HttpToolsProtocol):
    limits: Limits
    idle: dict["_Connection", None]
    """The connections without a request in progress, in descending order of idle time."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ):
        super().__init__(config, server_state, app_state, _loop)
        self._timer: asyncio.TimerHandle | None = None  # for headers, and for the body of a refused request
        self._reading: asyncio.TimerHandle | None = None  # for the client to read the response
        self._in_headers, self._in_body = True, False
        self._header_bytes = 0
        self._received = 0  # number of bytes in the headers, or in a body that is not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle[self] = None
        self._expire_after(HEADER_SECONDS)
        if len(self.connections) > self.limits.max_connections:
            longest = next(iter(self.idle))
            del self.idle[longest]
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        self._stop_reading_timer()
        self.idle.pop(self, None)
        super().connection_lost(exc)

    # ── Headers ──

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._received += len(data)
            if self._received > MAX_HEADERS:
                self.send_400_response("The headers are too large.")
                return
        if (self._in_headers or self in self.idle) and self._timer is None:
            self._expire_after(HEADER_SECONDS)

    def on_message_begin(self) -> None:
        self._in_headers, self._received, self._header_bytes = True, 0, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)  # trailers included
        if self._header_bytes > MAX_HEADERS:
            raise ValueError  # the parser stops, and the status is 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError
        self._keep()
        self.idle.pop(self, None)
        self._in_headers, self._in_body, self._received = False, True, 0
        super().on_headers_complete()

    # ── The body and the response ──

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._received += len(body)
            if self._received > self.limits.max_body:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if self.cycle.response_complete:
            self._keep()
            self.idle[self] = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self._in_body:
            self._expire_after(HEADER_SECONDS)
        elif self.cycle.response_complete:
            self.idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(self.limits.timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reading_timer()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _expire_after(self, seconds: float) -> None:
        """Closes the connection after the given number of seconds, unless `_keep` is called first."""
        self._keep()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _keep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
