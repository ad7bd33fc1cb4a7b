"""Answers requests: reads the body, limits the cost, computes the results, and writes the response as JSON.

The cost of a request is known before its results are computed. If the cost is too high, the request is refused. A
single thread prepares large requests and writes large responses, so that they do not block the event loop. A second
such thread would compete for the GIL with the thread that computes the results.
"""

import ast
import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

import numpy as np
import orjson
import pydantic
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from bert_jax.errors import InputError
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.server.batcher import Batcher, Job
from bert_jax.inference.server.limits import Limits, Refused
from bert_jax.inference.server.models import Served
from bert_jax.tasks.base import Request as TaskRequest

SMALL = 4096
"""The size up to which requests (in characters) and responses (in estimated bytes) are handled in the event loop.

Passing such requests and responses to a thread would take longer.
"""

Body = TypeVar("Body", bound=pydantic.BaseModel)
Value = TypeVar("Value")


Entry = TypeVar("Entry")
Items = Annotated[list[Entry], pydantic.Field(fail_fast=True)]
"""A list whose validation stops at the first error, because a large body can contain an error in every byte."""


class StrictBody(pydantic.BaseModel):
    """Base class for request bodies. Undeclared fields are refused, and values are not converted to other types."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Engine:
    """Answers requests with the pipelines of one or more models.

    Args:
        models: The models. A request that does not specify a model is answered by the first model that is served for
            the task.
        limits: The server's limits.
        batcher: The batcher that computes the results.
    """

    def __init__(self, models: Sequence[Served], limits: Limits, batcher: Batcher):
        self.models = {model.name: model for model in models}
        self.limits, self.batcher = limits, batcher
        self.ready = False
        self._thread = ThreadPoolExecutor(1, "preparing")

    def close(self) -> None:
        """Stops all threads after all accepted requests have been answered."""
        self.batcher.close()
        self._thread.shutdown()

    def pipeline(self, task: str, model: str | None = None) -> Pipeline[Any]:
        """Returns a model's pipeline for a task.

        If `model` is None, the pipeline of the first model that is served for the task is returned.

        Raises:
            Refused: If there is no model with this name, or if the model is not served for the task.
        """
        if model is not None and model not in self.models:
            raise self.unknown_model()
        for served in self.models.values() if model is None else [self.models[model]]:
            if task in served.pipes:
                return served.pipes[task]
        raise self.other_task(task, model)

    def other_task(self, task: str, model: str | None = None) -> Refused:
        """Returns the error to raise if `model` is not served for the requested task.

        If `model` is None, the message states that no model is served for the task.
        """
        owner = "The server has no model" if model is None else "This model is not served"
        return Refused(424, "other_task", f"{owner} for {task}; it answers {', '.join(self.tasks(model))}.")

    def tasks(self, model: str | None = None) -> list[str]:
        """Returns the tasks for which `model` or, if `model` is None, any model is served."""
        names = (name for served in self.models.values() if model in (None, served.name) for name in served.pipes)
        return list(dict.fromkeys(names))

    def unknown_model(self) -> Refused:
        """Returns the error to raise if there is no model with the requested name."""
        return Refused(
            404, "model_not_found", f"There is no model of this name; expected one of: {', '.join(self.models)}."
        )

    # ── The body ──

    async def read(self, request: Request, body: type[Body]) -> Body:
        """Reads and validates the body of a request.

        Raises:
            Refused: If the body is invalid, or if `read_bytes` refuses the request.
        """
        content = await self.read_bytes(request)
        if len(content) > SMALL:
            return await self.threaded(self._validated, content, body)
        return self._validated(content, body)

    def _validated(self, content: bytes, body: type[Body]) -> Body:
        try:
            return body.model_validate_json(content)
        except pydantic.ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, "not_json", "The body is not JSON.")
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in body.model_fields)
        unknown = f"there is an unknown field; expected {', '.join(body.model_fields)}"
        message = unknown if first["type"] == "extra_forbidden" else first["msg"]
        raise Refused(422, "invalid_input", f"{where or 'the body'}: {message}.")

    async def read_bytes(self, request: Request) -> bytes:
        """Reads the body of a request.

        Raises:
            Refused: If the server is not ready, or if the body is not declared as JSON, is compressed, is too large,
                or takes too long to arrive.
        """
        if not self.ready:
            raise Refused(503, "warming_up", "The server is starting; wait for 200 from /health.", {"Retry-After": "5"})
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "content_type", "Expected the content type application/json.")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refused(415, "content_encoding", "The body is compressed; send it without Content-Encoding.")
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
        return bytes(body)

    # ── The computation ──

    async def prepare(
        self,
        longest: int,
        entries: Sequence[Any],
        make: Callable[[Any], TaskRequest[Any]],
        *,
        parameters: Mapping[str, Any] | None = None,
        listed_as: str = "",
    ) -> list[TaskRequest[Any]]:
        """Makes task requests from the inputs of an HTTP request.

        Args:
            longest: Inputs are never truncated to fewer tokens than this number.
            entries: The inputs.
            make: A function that makes a task request from an input.
            parameters: The parameters that `make` uses, keyed by name. The server, not the client, chooses these names.
                Error messages do not quote the texts in the parameters.
            listed_as: The name used for the list of inputs in error messages; empty if there is no list.

        Raises:
            Refused: If an input or a parameter is invalid, or if the cost of the inputs is too high.
        """
        with refusing([entries, parameters]):
            self.check_count("the list of inputs", entries)
            for name, values in (parameters or {}).items():
                self.check_count(name, values)
                self.check_size(values, name)
            # `make` processes the texts in the parameters once per input.
            work = sum(len(text) + 1 for text in texts_of(entries))
            work += len(entries) * sum(len(text) + 1 for text in texts_of(list((parameters or {}).values())))
            if work > (most := self.limits.max_body):
                raise InputError(
                    f"the inputs, and the parameters once for each input, have {work} characters; at most {most} are "
                    "allowed."
                )
            if work > SMALL:
                return await self.threaded(self._prepared, longest, entries, make, listed_as)
            return self._prepared(longest, entries, make, listed_as)

    def _prepared(
        self, longest: int, entries: Sequence[Any], make: Callable[[Any], TaskRequest[Any]], listed_as: str
    ) -> list[TaskRequest[Any]]:
        # Each word has at least one token. Counting words takes a tenth of the time that tokenization takes.
        words = [sum(len(text.split()) for text in texts_of(entry)) for entry in entries]
        self.check_tokens(sum(min(count, longest) for count in words))
        requests: list[TaskRequest[Any]] = []
        tokens = size = 0
        for i, entry in enumerate(entries):
            try:
                self.check_size(entry)
                requests.append(make(entry))
            except InputError as error:
                raise InputError(f"{listed_as}[{i}]: {error}" if listed_as else str(error)) from None
            tokens, size = tokens + requests[-1].tokens, size + requests[-1].size
            self.check_tokens(tokens)
            if size > (most := self.limits.max_answer):
                message = f"The request asks for an answer of about {size} bytes; at most {most} are allowed."
                raise Refused(413, "too_costly", message)
        return requests

    def check_tokens(self, tokens: int) -> None:
        """Raises `Refused` if a request needs too many tokens."""
        if tokens > (most := self.limits.max_tokens):
            raise Refused(413, "too_costly", f"The request needs {tokens} tokens or more; at most {most} are allowed.")

    def check_count(self, name: str, values: Any) -> None:
        """Raises `InputError` if a list has too many entries."""
        if isinstance(values, list) and len(values) > (most := self.limits.max_inputs):
            raise InputError(f"{name} has {len(values)} entries; at most {most} are allowed.")

    def check_size(self, entry: Any, name: str = "the input") -> None:
        """Raises `InputError` if an input or a parameter has too many characters."""
        size = sum(map(len, texts_of(entry)))
        if size > (most := self.limits.max_characters):
            raise InputError(f"{name} has {size} characters; at most {most} are allowed.")

    async def compute(
        self, request: Request, pipe: Pipeline[Any], prepared: Sequence[TaskRequest[Any]]
    ) -> Sequence[Any]:
        """Computes and returns the results of task requests, in the order of the requests.

        Args:
            request: The HTTP request. If the client disconnects, the computation stops.
            pipe: The pipeline that computes the results.
            prepared: The task requests.

        Raises:
            Refused: If the client disconnects before the results are ready, or if `Batcher.submit` refuses the job.
        """
        if not prepared:
            return []
        answer = asyncio.ensure_future(self.batcher.submit(Job(pipe, prepared)))
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Refused(499, "gone", "The client disconnected.")
            results: Sequence[Any] = answer.result()
            return results
        finally:
            for task in (answer, left):
                task.cancel()

    async def respond(
        self, content: Any, prepared: Sequence[TaskRequest[Any]] = (), *, large: bool = False
    ) -> Response:
        """Writes a response as JSON.

        Args:
            content: The content of the response.
            prepared: The task requests that the response answers. The total size of the results determines whether a
                separate thread writes the response.
            large: If true, a separate thread writes the response regardless of its size.
        """
        large = large or sum(made.size for made in prepared) > SMALL
        body = await self.threaded(_json, content) if large else _json(content)
        return Response(body, media_type="application/json")

    async def threaded(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Calls a function in the engine's thread, outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _json(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY, default=np.ndarray.tolist)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@contextlib.contextmanager
def refusing(content: Any) -> Iterator[None]:
    """Replaces an `InputError` with a `Refused` error that does not quote any of the client's texts in `content`."""
    try:
        yield
    except InputError as error:
        raise Refused(422, "invalid_input", without_quotes(str(error), list(texts_of(content)))) from None


def without_quotes(message: str, texts: Sequence[str]) -> str:
    """Returns the message with '…' in place of each quotation that occurs in one of the texts or cannot be parsed."""

    def replaced(match: re.Match[str]) -> str:
        try:
            quoted = str(ast.literal_eval(re.sub("…(.)$", r"\1", match[0])))  # without the truncation mark
        except (ValueError, SyntaxError):
            return "'…'"
        return "'…'" if any(quoted in text for text in texts) else match[0]

    return re.sub(r"(?<!\w)(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", replaced, message)


def texts_of(content: Any) -> Iterator[str]:
    """Yields all strings in a value that was read from JSON, including field names, in no particular order."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            parts += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            parts += part
