"""Serves a model over HTTP: requests of many clients are computed together, and each is answered in bounded time.

    bert-jax serve bert-mini-cased
    curl -H 'Content-Type: application/json' localhost:8000/score -d '{"inputs": {"input_string": ["A [MASK] day."]}}'

The answers are those of `pipeline(…)`: the server uses the same tokenization, batches and programs. All programs are
compiled before the server reports that it is ready. The cost of a request is known before it is computed, and one that
costs too much is refused. Threads prepare large requests, and write large answers, so that the event loop stays free.
"""

import ast
import asyncio
import contextlib
import inspect
import json
import logging
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pydantic
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from bert_jax import __version__
from bert_jax.errors import InputError
from bert_jax.inference import catalogue
from bert_jax.inference.batcher import Attention, Batcher, Job, Limits, Refused
from bert_jax.inference.pipelines import Pipeline
from bert_jax.tasks.base import Request as TaskRequest
from bert_jax.tasks.base import Task

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
SAMPLE = {
    "inputs": {"input_string": ["Paris is the [MASK] of France.", "Today is a [MASK] day!"]},
    "parameters": {"top_k": 2},
}
"""The example request on BERT's card in Azure's model catalogue."""
SMALL = 4096
"""A request with at most this number of characters, or an answer of about as many bytes, is handled by the event loop
itself, because handing it to a thread would take longer."""
STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


def body_model(pipe: Pipeline[Task]) -> type[pydantic.BaseModel]:
    """The pydantic model of the body of /v1/{task}: the inputs, and the parameters of the task's function `request`."""
    entry = pipe.task.json_input
    fields: dict[str, Any] = {"inputs": (entry | list[entry], ...)}  # type: ignore[valid-type]
    hints = get_type_hints(pipe.task.request)
    parameters = list(inspect.signature(pipe.task.request).parameters.values())[1:]
    fields |= {parameter.name: (hints[parameter.name], parameter.default) for parameter in parameters}
    return pydantic.create_model(f"{pipe.task.name.title().replace('-', '')}Body", __config__=STRICT, **fields)


class AttentionBody(pydantic.BaseModel):
    """The body of /v1/attention."""

    model_config = STRICT
    text: str
    layer: int


class Server:
    """The application and its metrics.

    Args:
        name: The name of the model, as clients see it.
        pipes: The pipelines by task. The first one answers requests to /score.
        limits: What the server accepts.
    """

    def __init__(self, name: str, pipes: dict[str, Pipeline[Task]], limits: Limits):
        self.name, self.pipes, self.limits = name, pipes, limits
        self.first = next(iter(pipes.values()))
        self.ready = False
        self.failure = ""
        """Why the programs cannot be compiled, if they cannot."""
        self.stop: Callable[[], None] = lambda: None
        """Ends the HTTP server."""
        self.attention: Attention  # set by `_warm_up`, which compiles its programs
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("bert_jax_requests", "Number of requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram("bert_jax_request_seconds", "Seconds per request.", ["route"], registry=registry)
        self.shared = Histogram("bert_jax_slice_requests", "Requests that share a slice.", registry=registry,
                                buckets=[1, 2, 4, 8, 16, 32, 64, 128])  # fmt: skip
        self.batcher = Batcher(limits, self.shared.observe)
        self.threads = ThreadPoolExecutor(2, "preparing")
        Gauge("bert_jax_queue_tokens", "Tokens of unanswered requests.", registry=registry).set_function(
            lambda: self.batcher.waiting
        )
        Gauge("bert_jax_programs", "Compiled programs.", registry=registry).set_function(
            lambda: sum(len(pipe.programs) for pipe in pipes.values())
        )
        self.app = self._app()

    def _app(self) -> FastAPI:
        app = FastAPI(title=f"bert_jax: {self.name}", version=__version__, lifespan=self._life, redoc_url=None)
        for kind in (Refused, HTTPException, Exception):
            app.add_exception_handler(kind, _failed)
        app.add_middleware(Counting, server=self)
        app.get("/health")(self._health)
        app.get("/metrics")(self._metrics)
        app.get("/", include_in_schema=False)(lambda: FileResponse(STATIC / "index.html"))
        app.get("/page.js", include_in_schema=False)(lambda: FileResponse(STATIC / "page.js"))
        app.post("/score", openapi_extra=_documented({"type": "object", "example": SAMPLE}))(self._score)
        for task, pipe in self.pipes.items():
            body = body_model(pipe)
            documented = _documented(body.model_json_schema())
            app.post(f"/v1/{task}", name=task, openapi_extra=documented)(self._predicting(pipe, body))
        app.post("/v1/attention", openapi_extra=_documented(AttentionBody.model_json_schema()))(self._attend)
        return app

    @contextlib.asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(asyncio.to_thread(self._warm_up))
        yield
        await warming
        await asyncio.to_thread(self.batcher.close)
        self.threads.shutdown()

    def _warm_up(self) -> None:
        began = time.perf_counter()
        try:
            for pipe in self.pipes.values():
                pipe.warm_up()
            self.attention = Attention(self.first)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self.stop()
            return
        self.ready = True
        logger.info("Ready after %.0f s of compiling.", time.perf_counter() - began)

    # ── Routes ──

    async def _health(self) -> Response:
        """Reports whether all programs are compiled."""
        state = {"status": "ready" if self.ready else "warming up", "model": self.name, "tasks": list(self.pipes),
                 "layers": self.first.config.num_hidden_layers}  # fmt: skip
        return JSONResponse(state, status_code=200 if self.ready else 503)

    async def _metrics(self) -> Response:
        """The metrics, in Prometheus' text format."""
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _score(self, request: Request) -> Response:
        """Answers a request in the format of Azure's model catalogue: `inputs` (or `input_data`) and `parameters`."""
        content = await self._content(request)
        with _refusing(content):
            inputs, parameters = catalogue.read(content)
        return await self._predict(request, self.first, inputs, parameters, lambda results: results)

    def _predicting(self, pipe: Pipeline[Task], body: type[pydantic.BaseModel]) -> Callable[[Request], Any]:
        async def predict(request: Request) -> Response:
            given = _validated(body, await self._content(request))
            inputs = given.pop("inputs")
            return await self._predict(
                request, pipe, inputs, given, lambda results: {"model": self.name, "outputs": results}
            )

        predict.__doc__ = f"{pipe.task.name}: an input or a list of inputs, and the task's parameters."
        return predict

    async def _attend(self, request: Request) -> Response:
        """The attention weights of each token of a text, by head, in one layer (counted from 0)."""
        given = _validated(AttentionBody, await self._content(request))
        last = self.first.config.num_hidden_layers - 1
        with _refusing(given):
            if not 0 <= given["layer"] <= last:
                raise InputError(f"layer is {given['layer']}; expected 0 to {last}.")
            self._check_size(given["text"])
            weights = await self._threaded(self.attention.weights, given["text"], given["layer"])
        return JSONResponse(weights)

    # ── From a body to an answer ──

    async def _content(self, request: Request) -> Any:
        if not self.ready:
            raise Refused(503, "warming_up", "The server is starting; wait for 200 from /health.", {"Retry-After": "5"})
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "content_type", "Expected the content type application/json.")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.max_body:
                        raise Refused(413, "too_large", f"The body has more than {self.limits.max_body} bytes.")
        except TimeoutError:
            raise Refused(408, "timeout", f"The body did not arrive within {self.limits.timeout:g} s.") from None
        except ClientDisconnect:
            raise Refused(499, "gone", "The client disconnected.") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "not_json", "The body is not JSON.") from None

    async def _predict(
        self,
        request: Request,
        pipe: Pipeline[Task],
        inputs: Any,
        parameters: dict[str, Any],
        content: Callable[[Any], Any],
    ) -> Response:
        """Answers a request with the results of its inputs; `content` makes the answer from them.

        Raises:
            Refused: If an input or a parameter is invalid, or if the inputs cost too much. See also `_answer`.
        """
        several = isinstance(inputs, list)
        entries = inputs if several else [inputs]
        with _refusing([inputs, parameters]):
            if len(entries) > self.limits.max_inputs:
                raise InputError(f"there are {len(entries)} inputs; at most {self.limits.max_inputs} are allowed.")
            if sum(map(len, _texts([inputs, parameters]))) > SMALL:
                requests = await self._threaded(self._prepared, pipe, entries, parameters, several)
            else:
                requests = self._prepared(pipe, entries, parameters, several)
        results = await self._answer(request, Job(pipe, requests)) if requests else []
        answer = content(results if several else results[0])
        large = sum(made.size for made in requests) > SMALL
        body = await self._threaded(_json, answer) if large else _json(answer)
        return Response(body, media_type="application/json")

    def _prepared(
        self, pipe: Pipeline[Task], entries: list[Any], parameters: dict[str, Any], several: bool
    ) -> list[TaskRequest[Any]]:
        """Makes the requests of a task from inputs.

        Raises:
            InputError: If an input or a parameter is invalid.
            Refused: If the inputs cost too much.
        """
        limits, requests = self.limits, []
        tokens = size = 0
        for i, entry in enumerate(entries):
            try:
                self._check_size(entry)
                requests.append(pipe.request(entry, parameters))
            except InputError as error:
                raise InputError(f"inputs[{i}]: {error}" if several else str(error)) from None
            tokens, size = tokens + requests[-1].tokens, size + requests[-1].size
            for what, number, most in [("tokens", tokens, limits.max_tokens), ("bytes", size, limits.max_answer)]:
                if number > most:
                    doing = "needs" if what == "tokens" else "asks for an answer of about"
                    raise Refused(
                        413, "too_costly", f"The request {doing} {number} {what}; at most {most} are allowed."
                    )
        return requests

    async def _threaded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in one of the threads that keep work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def _check_size(self, entry: Any) -> None:
        size = sum(map(len, _texts(entry)))
        if size > self.limits.max_characters:
            raise InputError(f"the input has {size} characters; at most {self.limits.max_characters} are allowed.")

    async def _answer(self, request: Request, job: Job) -> Any:
        """Returns the answer to a job.

        Raises:
            Refused: If the client disconnects before the answer; the job is then dropped unless it has started. See
                also `Batcher.submit`.
        """
        answer = asyncio.ensure_future(self.batcher.submit(job))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Refused(499, "gone", "The client disconnected.")
            return answer.result()
        finally:
            for task in (answer, left):
                task.cancel()


class Counting:
    """Middleware that counts and times requests; it is cheaper than a subclass of Starlette's `BaseHTTPMiddleware`."""

    def __init__(self, app: Any, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request to the application and records its status and time."""
        began, status = time.perf_counter(), 500

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if scope["type"] == "http":
                route = getattr(scope.get("route"), "path", "other")
                self.server.requests.labels(route, status).inc()
                self.server.seconds.labels(route).observe(time.perf_counter() - began)


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=np.ndarray.tolist).encode()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _validated(body: type[pydantic.BaseModel], content: Any) -> dict[str, Any]:
    try:
        return body.model_validate_json(json.dumps(content)).model_dump(exclude_unset=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in body.model_fields)
        unknown = f"there is an unknown field; expected {', '.join(body.model_fields)}"
        message = unknown if first["type"] == "extra_forbidden" else first["msg"]
        raise Refused(422, "invalid_input", f"{where or 'the body'}: {message}.") from None


@contextlib.contextmanager
def _refusing(content: Any) -> Any:
    """Replaces an `InputError` by `Refused`, with a message that quotes none of the client's texts in `content`."""
    try:
        yield
    except InputError as error:
        raise Refused(422, "invalid_input", without_quotes(str(error), list(_texts(content)))) from None


def without_quotes(message: str, texts: Sequence[str]) -> str:
    """The message, with '…' in place of each quotation that occurs in one of the texts or cannot be parsed."""

    def replaced(match: re.Match[str]) -> str:
        try:
            quoted = str(ast.literal_eval(match[0].replace("…", "")))
        except (ValueError, SyntaxError):
            return "'…'"
        return "'…'" if any(quoted in text for text in texts) else match[0]

    return re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", replaced, message)


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list | tuple | dict):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _texts(part)


def _documented(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _failed(request: Request, error: Exception) -> Response:
    """The response to a request whose handling raised an exception."""
    if isinstance(error, HTTPException):  # raised by Starlette, for example for an unknown route
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        error = Refused(error.status_code, code, str(error.detail), dict(error.headers or {}))
    if not isinstance(error, Refused):
        error = Refused(500, "fault", "The server failed; the request may be valid.")
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, error.status, error.headers)


def serve(
    name: str,
    pipes: dict[str, Pipeline[Task]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers the requests it has accepted and returns.

    Args:
        name: The name of the model, as clients see it.
        pipes: The pipelines by task. The first one answers requests to /score.
        host: The address to listen at.
        port: The port to listen at; 0 for a free one.
        limits: What the server accepts; the defaults of `Limits` if None.

    Raises:
        InputError: If the server cannot listen at the address.
        SystemExit: With status 1, if the programs cannot be compiled.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise InputError(f"Cannot listen at {host}, port {port}: {error.strerror}.") from None
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    host, port = listener.getsockname()[:2]
    logger.info("http://%s:%s answers %s with %s", host, port, ", ".join(pipes), name)
    server = Server(name, pipes, limits or Limits())
    http = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", access_log=False))
    server.stop = lambda: setattr(http, "should_exit", True)
    http.run(sockets=[listener])
    if server.failure:
        sys.exit(f"bert-jax: cannot compile the programs: {server.failure}")
