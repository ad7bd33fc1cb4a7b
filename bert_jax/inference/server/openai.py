"""OpenAI-compatible routes for embeddings and models.

Source: OpenAI's API reference, https://platform.openai.com/docs/api-reference/embeddings.
"""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic
from fastapi import APIRouter, Request, Response

from bert_jax.errors import InputError
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.server.engine import Engine, Items, StrictBody
from bert_jax.inference.server.limits import Limits, Refused
from bert_jax.inference.server.models import Served
from bert_jax.inference.server.tasks import documented
from bert_jax.sentence_embedding import SentenceEmbedding
from bert_jax.tasks.base import Request as TaskRequest


class EmbeddingsBody(StrictBody):
    """The body of a request to `/v1/embeddings`. `dimensions` must be null. `user` is ignored."""

    input: str | Items[str] | Items[int] | Items[Items[int]]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


class Embedding(pydantic.BaseModel):
    """An embedding: a list of numbers or, if requested, little-endian float32 numbers encoded as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(pydantic.BaseModel):
    """The total number of tokens in all inputs, including special tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(pydantic.BaseModel):
    """The response from `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(pydantic.BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(pydantic.BaseModel):
    """The response from `/v1/models`."""

    object: Literal["list"]
    data: list[Model]


def declared_embedding(pipe: Pipeline[Any]) -> SentenceEmbedding | None:
    """Returns the pooling that a model's folder declares, or None if the folder declares no supported pooling."""
    try:
        embedding: SentenceEmbedding = pipe.task.embedding
    except InputError:
        return None
    return embedding


def embedding_length(pipe: Pipeline[Any]) -> int:
    """Returns the maximum number of tokens in a text to embed, including special tokens."""
    length: int = pipe.task.embedding_length if declared_embedding(pipe) else pipe.max_length
    return length


def sentence_embedding(
    pipe: Pipeline[Any],
    limits: Limits,
    text: str | Sequence[int],
    *,
    normalize: bool | None = None,
    truncate: bool | None = None,
) -> TaskRequest[np.ndarray]:
    """Makes a task request to embed a text or a list of token ids with the pooling that the model's folder declares.

    Raises:
        InputError: If the text is too long and must not be truncated, or if the input consists of token ids and the
            server does not accept them.
        Refused: If the model's folder declares no supported pooling.
    """
    if declared_embedding(pipe) is None:
        raise Refused(
            424,
            "no_pooling",
            "The folder of the model declares no pooling that is supported (modules.json, 1_Pooling/config.json). "
            "Use /v1/feature-extraction and choose one.",
        )
    if not isinstance(text, str) and not limits.accept_token_ids:
        raise InputError("token ids are not accepted; send texts, or start the server with --accept-token-ids.")
    truncate = limits.truncate if truncate is None else truncate
    request: TaskRequest[np.ndarray] = pipe.task.embed(text, normalize=normalize, truncate=truncate)
    return request


def inputs_of(given: str | Sequence[Any], name: str) -> list[Any]:
    """Returns the inputs of an embedding request. Each input is a text or a list of token ids.

    Raises:
        Refused: If there are no inputs. The message uses `name` as the name of the field.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refused(422, "invalid_input", f"{name} is empty.")
    return [given] if isinstance(given[0], int) else list(given)


def routes(engine: Engine) -> APIRouter:
    """Returns the OpenAI-compatible routes for the models of `engine`."""
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/embeddings", openapi_extra=documented(EmbeddingsBody), responses={200: {"model": EmbeddingsAnswer}}
    )
    async def embeddings(request: Request) -> Response:
        """Returns sentence embeddings, computed with the pooling and normalization that the model's folder declares."""
        body = await engine.read(request, EmbeddingsBody)
        pipe = engine.pipeline("feature-extraction", body.model)
        if body.dimensions is not None:
            raise Refused(422, "dimensions", "dimensions is not supported; the embeddings keep the size of the model.")
        prepared = await engine.prepare(
            embedding_length(pipe),
            inputs_of(body.input, "input"),
            lambda text: sentence_embedding(pipe, engine.limits, text),
            listed_as="" if isinstance(body.input, str) else "input",
        )
        vectors = await engine.compute(request, pipe, prepared)
        written = _base64 if body.encoding_format == "base64" else np.asarray
        tokens = sum(made.tokens for made in prepared)
        return await engine.respond(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": i, "embedding": written(vector)}
                    for i, vector in enumerate(vectors)
                ],
                "model": body.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            prepared,
        )

    @router.get("/v1/models", responses={200: {"model": ModelsAnswer}})
    async def models() -> Response:
        """Lists the served models."""
        return await engine.respond({"object": "list", "data": [_described(model) for model in engine.models.values()]})

    @router.get("/v1/models/{model:path}", responses={200: {"model": Model}})
    async def model(model: str) -> Response:
        """Describes one of the served models."""
        if model not in engine.models:
            raise engine.unknown_model()
        return await engine.respond(_described(engine.models[model]))

    return router


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def _described(model: Served) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "bert_jax"}
