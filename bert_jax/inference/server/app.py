"""Serves models over HTTP. Requests from many clients are computed together, and each is answered in bounded time.

    bert-jax serve bert-mini-cased
    curl -H 'Content-Type: application/json' localhost:8000/score -d '{"inputs": {"input_string": ["A [MASK] day."]}}'

The results are the same as those of `bert_jax.pipeline`, because the server uses the same tokenization, batches
and programs.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pydantic
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bert_jax import __version__
from bert_jax.errors import InputError
from bert_jax.inference.server import openai, tasks, tei
from bert_jax.inference.server.attention import Attention
from bert_jax.inference.server.batcher import Batcher
from bert_jax.inference.server.connections import protocol
from bert_jax.inference.server.engine import Engine
from bert_jax.inference.server.guard import Guard
from bert_jax.inference.server.limits import Limits, Refused
from bert_jax.inference.server.log import JsonLines
from bert_jax.inference.server.models import Served
from bert_jax.inference.server.programs import Programs

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
SWITCH_SECONDS = 0.0005
"""Python's thread switch interval, in seconds.

With the default of 5 ms, a request would have to wait more than once for the thread that prepares large requests.
"""
SPARE_FILES = 256
"""The number of files that the process may open in addition to its connections."""


@dataclass(frozen=True)
class Access:
    """Specifies who may use the server.

    Attributes:
        api_key: The key that clients must send in an `Authorization: Bearer …` header. If empty, no key is required.
            `/health` never requires a key.
        allowed_hosts: Values of the `Host` header that the server accepts; `*.example.com` accepts all subdomains. If
            empty, a server that listens on a loopback address accepts only `localhost`, `127.0.0.1` and `[::1]`, and
            any other server accepts any value. `/health` accepts any `Host` header.
        allow_origins: The origins of web pages that may read responses; `*` for all. By default, no origins are
            allowed.
    """

    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()


class ModelState(pydantic.BaseModel):
    """A served model: its name, its tasks, and its number of layers."""

    name: str
    tasks: list[str]
    layers: int


class Health(pydantic.BaseModel):
    """The response from `/health`: the server's state, the number of programs left to compile, and the models."""

    status: Literal["starting", "ready"]
    programs_left: int
    models: list[ModelState]


class Server:
    """The application and its metrics.

    Args:
        models: The models. The first model answers requests to `/score`.
        limits: The server's limits.
        access: The access settings, which specify who may use the server.
    """

    def __init__(self, models: Sequence[Served], limits: Limits, access: Access):
        self.failure = ""
        """The reason why the programs could not be compiled; empty if no compilation has failed."""
        self.stop: Callable[[], None] = lambda: None
        """Stops the HTTP server."""
        self.registry = CollectorRegistry()
        shared = Histogram("bert_jax_slice_requests", "Unfinished requests at a slice.", registry=self.registry,
                           buckets=[1, 2, 4, 8, 16, 32, 64, 128])  # fmt: skip
        pipes = [pipe for model in models for pipe in model.pipes.values()]
        attention = Attention(pipes[0])
        self.programs = Programs(models, attention)
        self.engine = Engine(models, limits, Batcher(limits, shared.observe, self.programs.want))
        gauges = {
            "bert_jax_queue_tokens": ("Tokens of unanswered requests.", lambda: self.engine.batcher.waiting),
            "bert_jax_programs": ("Compiled programs.", lambda: sum(len(pipe.programs) for pipe in pipes)),
        }
        for name, (description, function) in gauges.items():
            Gauge(name, description, registry=self.registry).set_function(function)
        app = FastAPI(title="bert_jax", version=__version__, lifespan=self._life, docs_url=None, redoc_url=None)
        for kind in (Refused, HTTPException, Exception):
            app.add_exception_handler(kind, self._refused)
        app.get("/health", responses={status: {"model": Health} for status in (200, 503)})(self._health)
        app.get("/metrics", response_class=PlainTextResponse)(self._metrics)
        for router in (tasks.routes(self.engine, attention), openai.routes(self.engine), tei.routes(self.engine)):
            app.include_router(router)
        for path, name in [
            ("/", "index.html"),
            ("/page.js", "page.js"),
            ("/docs", "docs.html"),
            ("/docs.js", "docs.js"),
        ]:
            app.get(path, include_in_schema=False)(_file(STATIC / name))
        app.mount("/swagger", StaticFiles(packages=[("fastapi_offline", "static")]))
        self.app: ASGIApp = Guard(
            app,
            api_key=access.api_key,
            allowed_hosts=access.allowed_hosts,
            registry=self.registry,
            check_room=lambda arriving: self.engine.batcher.check_room(arriving=arriving),
        )
        if access.allow_origins:
            self.app = CORSMiddleware(
                self.app, allow_origins=access.allow_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )

    @contextlib.asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        compiling = asyncio.create_task(asyncio.to_thread(self._compile))
        try:
            yield
        finally:
            self.programs.close()
        await compiling
        await asyncio.to_thread(self.engine.close)

    def _compile(self) -> None:
        began = time.perf_counter()
        try:
            self.programs.compile_usual()
            _settle()
            self.engine.ready = True
            logger.info("Ready after %.1f s; %d programs are left.", time.perf_counter() - began, self.programs.left)
            self.programs.compile_rest(self.engine.batcher.resume)
            _settle()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self.stop()

    async def _health(self) -> Response:
        """Returns status 200 if the server is ready, otherwise 503."""
        models = [
            ModelState(name=model.name, tasks=list(model.pipes), layers=pipe.config.num_hidden_layers)
            for model in self.engine.models.values()
            for pipe in [next(iter(model.pipes.values()))]
        ]
        ready = self.engine.ready
        state = Health(status="ready" if ready else "starting", programs_left=self.programs.left, models=models)
        return JSONResponse(state.model_dump(), 200 if ready else 503)

    async def _metrics(self) -> Response:
        """Returns the metrics in the Prometheus text format."""
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # raised by Starlette, for example for an unknown route
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
            message = self._no_route() if error.status_code == 404 else str(error.detail)
            error = Refused(error.status_code, code, message, dict(error.headers or {}))
        if not isinstance(error, Refused):
            error = Refused(500, "fault", "The server failed; the request may be valid.")
        return error.response(request.url.path)

    def _no_route(self) -> str:
        """Returns the error message for a nonexistent route, such as a route for a task that no model serves."""
        first, *_ = self.engine.tasks()
        routes = [f"/score ({first})", *(f"/v1/{task}" for task in self.engine.tasks())]
        return f"There is no such route; the tasks of this server are at {', '.join(routes)}, and /docs has all routes."


def _settle() -> None:
    """Collects garbage and freezes the remaining objects.

    Otherwise, a later garbage collection would stop all threads for a second.
    """
    gc.collect()
    gc.freeze()


def _file(path: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(path)


def serve(
    models: Sequence[Served],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    access: Access | None = None,
) -> None:
    """Serves models until SIGTERM or Ctrl-C, then answers all accepted requests and returns.

    Args:
        models: The models. The first model answers requests to `/score`.
        host: The address to listen on.
        port: The port to listen on; 0 for any free port.
        limits: The server's limits; the defaults of `Limits` if None.
        access: The access settings; the defaults of `Access` if None.

    Raises:
        InputError: If the server cannot listen on the address.
        SystemExit: If the programs cannot be compiled. The exit status is 1.
    """
    limits, access = limits or Limits(), access or Access()
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise InputError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from None
    log = JsonLines()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns about each malformed request
    _allow_files(limits.max_connections + SPARE_FILES)
    host, port = listener.getsockname()[:2]
    for model in models:
        logger.info("http://%s:%s answers %s with %s", host, port, ", ".join(model.pipes), model.name)
    if ipaddress.ip_address(host).is_loopback:
        if not access.allowed_hosts:
            access = replace(access, allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    elif not access.api_key:
        logger.warning("The server listens on a non-loopback address without a key; see --api-key.")
    server = Server(models, limits, access)
    config = uvicorn.Config(server.app, http=protocol(limits), ws="none", log_config=None, access_log=False,
                            server_header=False, proxy_headers=False)  # fmt: skip
    http = uvicorn.Server(config)
    server.stop = lambda: setattr(http, "should_exit", True)
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops on SIGTERM and raises the signal again at the end
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has stopped and raises it again
        http.run(sockets=[listener])
    log.close()
    if server.failure:
        sys.exit(f"bert-jax: cannot compile the programs: {server.failure}")


def _allow_files(number: int) -> None:
    """Raises the limit on the number of open files to `number`, or as close to it as the system allows."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (-1, resource.RLIM_INFINITY) and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number if hard < 0 else min(number, hard), hard))
