"""This package's routes: `/score` in the JSON format of Azure's model catalog, `/v1/{task}`, and `/v1/attention`."""

import asyncio
import functools
import inspect
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import orjson
import pydantic
from fastapi import APIRouter, Request, Response

from bert_jax.errors import InputError
from bert_jax.inference import catalog
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.server.attention import Attention
from bert_jax.inference.server.engine import Engine, Items, StrictBody, refusing
from bert_jax.inference.server.limits import Refused
from bert_jax.tasks.base import Task

SAMPLE = {
    "inputs": {"input_string": ["Paris is the [MASK] of France.", "Today is a [MASK] day!"]},
    "parameters": {"top_k": 2},
}
"""The example request on BERT's model card in Azure's model catalog."""


def documented(body: type[pydantic.BaseModel] | dict[str, Any]) -> dict[str, Any]:
    """Converts a request body's pydantic model or JSON schema to an OpenAPI description."""
    schema = body if isinstance(body, dict) else body.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_model(task: Task) -> type[pydantic.BaseModel]:
    """Returns the pydantic model of the request body for `/v1/{task}`.

    The body contains the inputs, the parameters of the task's `request` method, and the name of a model.
    """
    entry = _failing_fast(task.json_input)
    # If an input can be a single text, a list is always read as a list of inputs, because a list of two texts could
    # otherwise mean two inputs or one pair.
    single = str if task.json_input | str == task.json_input else entry
    inputs: Any = single | Items[entry]  # type: ignore[valid-type]
    fields: dict[str, Any] = {"inputs": (inputs, ...), "model": (str | None, None)}
    hints = get_type_hints(task.request)
    parameters = list(inspect.signature(task.request).parameters.values())[1:]
    fields |= {parameter.name: (_failing_fast(hints[parameter.name]), parameter.default) for parameter in parameters}
    return pydantic.create_model(f"{_title(task)}Body", __base__=StrictBody, **fields)


def _failing_fast(kind: Any) -> Any:
    """Replaces lists and sequences in a type with `Items`, and limits the number of entries in dicts."""
    origin, parts = get_origin(kind), [_failing_fast(part) for part in get_args(kind)]
    if origin in (list, Sequence):
        return Items[parts[0]]  # type: ignore[valid-type]
    if origin is dict:
        return Annotated[dict[parts[0], parts[1]], pydantic.Field(max_length=16)]  # type: ignore[valid-type]
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, parts)
    return kind


def outputs_type(task: Task) -> Any:
    """Returns the type of a task's outputs: either one output or a list of outputs."""
    (result,) = get_args(get_type_hints(task.request)["return"])
    if result is np.ndarray:
        result = list[float] | list[list[float]] | list[list[list[float]]]
    return result | list[result]  # type: ignore[valid-type]


def answer_model(task: Task) -> type[pydantic.BaseModel]:
    """Returns the pydantic model of the response from `/v1/{task}`: the name of the model, and the outputs."""
    return pydantic.create_model(f"{_title(task)}Answer", model=(str, ...), outputs=(outputs_type(task), ...))


def _title(task: Task) -> str:
    return task.name.title().replace("-", "")


class AttentionBody(StrictBody):
    """The body of a request to `/v1/attention`."""

    text: str
    layer: int


class AttentionAnswer(pydantic.BaseModel):
    """The response from `/v1/attention`: the tokens, and the attention weights [heads, tokens, tokens]."""

    tokens: list[str]
    attention: list[list[list[float]]]


def routes(engine: Engine, attention: Attention) -> APIRouter:
    """Returns the task routes for the models of `engine`."""
    router = APIRouter(tags=["Tasks"])
    scorer = next(iter(next(iter(engine.models.values())).pipes.values()))
    thread = ThreadPoolExecutor(1, "attention")  # programs may have to be compiled first

    async def answer(
        request: Request, pipe: Pipeline[Any], inputs: Any, parameters: dict[str, Any], model: str | None = None
    ) -> Response:
        with refusing(parameters):
            pipe.check_parameters(parameters)
        several = isinstance(inputs, list)
        prepared = await engine.prepare(
            pipe.max_length,
            inputs if several else [inputs],
            lambda entry: pipe.request(entry, parameters),
            parameters=parameters,
            listed_as="inputs" if several else "",
        )
        results = await engine.compute(request, pipe, prepared)
        outputs = results if several else results[0]
        return await engine.respond({"model": model, "outputs": outputs} if model else outputs, prepared)

    @router.post(
        "/score",
        openapi_extra=documented({"type": "object", "example": SAMPLE}),
        responses={200: {"model": outputs_type(scorer.task)}},
    )
    async def score(request: Request) -> Response:
        """Answers a request in the JSON format of Azure's model catalog.

        The fields are `inputs` (or `input_data`) and `parameters`. The request is answered with the first task
        of the server's first model. The response contains only the outputs, in the same format as the `outputs` field
        of a `/v1/{task}` response.
        """
        try:
            content = orjson.loads(await engine.read_bytes(request))
        except orjson.JSONDecodeError:
            raise Refused(400, "not_json", "The body is not JSON.") from None
        with refusing(content):
            inputs, parameters = catalog.read(content)
        return await answer(request, scorer, inputs, parameters)

    def add(task: Task) -> None:
        body = body_model(task)

        async def predict(request: Request) -> Response:
            given = (await engine.read(request, body)).model_dump(exclude_unset=True)
            name, inputs = given.pop("model", None), given.pop("inputs")
            pipe = engine.pipeline(task.name, name)
            named = name or next(name for name, served in engine.models.items() if task.name in served.pipes)
            return await answer(request, pipe, inputs, given, named)

        predict.__doc__ = f"{task.name}: an input or a list of inputs, and the task's parameters."
        router.post(
            f"/v1/{task.name}",
            name=task.name,
            openapi_extra=documented(body),
            responses={200: {"model": answer_model(task)}},
        )(predict)

    for name in engine.tasks():
        add(engine.pipeline(name).task)

    @router.post("/v1/attention", openapi_extra=documented(AttentionBody), responses={200: {"model": AttentionAnswer}})
    async def attend(request: Request) -> Response:
        """Returns the attention weights between the tokens of a text in each head of a layer.

        Layer numbers start at 0.
        """
        body = await engine.read(request, AttentionBody)
        last = attention.pipe.config.num_hidden_layers - 1
        with refusing(body.text):
            if not 0 <= body.layer <= last:
                raise InputError(f"layer is {body.layer}; expected 0 to {last}.")
            engine.check_size(body.text)
            computing = asyncio.get_running_loop().run_in_executor(thread, attention.weights, body.text, body.layer)
            try:
                weights = await asyncio.wait_for(computing, engine.limits.timeout)
            except TimeoutError:
                raise engine.batcher.too_late() from None
        return await engine.respond(weights, large=True)

    return router
