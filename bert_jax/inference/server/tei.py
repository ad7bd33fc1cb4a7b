"""Routes that are compatible with clients of text-embeddings-inference (TEI).

Source: `docs/openapi.json` in version 1.7 of https://github.com/huggingface/text-embeddings-inference.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from fastapi import APIRouter, Request, Response

from bert_jax import __version__
from bert_jax.errors import InputError
from bert_jax.inference.pipelines import Pipeline
from bert_jax.inference.server.engine import Engine, Items, StrictBody, refusing
from bert_jax.inference.server.limits import Refused
from bert_jax.inference.server.openai import declared_embedding, embedding_length, inputs_of, sentence_embedding
from bert_jax.inference.server.tasks import documented
from bert_jax.tasks.base import LabelScore
from bert_jax.tasks.base import Request as TaskRequest
from bert_jax.tasks.sequence_classification import SequenceClassification

Texts = str | Items[str]
TextsOrIds = str | Items[str] | Items[int] | Items[Items[int]]
Pair = Annotated[Items[str], pydantic.Field(min_length=1, max_length=2)]
TokenVectors = list[list[list[float]]]


class TruncatingBody(StrictBody):
    """The truncation fields of a request body. If `truncate` is missing or null, the server's setting applies."""

    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] = "right"


class EmbedBody(TruncatingBody):
    """The body of a request to `/embed`. `prompt_name` and `dimensions` must be null.

    If `normalize` is true, each vector is scaled to length 1. If `truncate` is null, the server's setting applies.
    """

    inputs: TextsOrIds
    normalize: bool = True
    prompt_name: None = None
    dimensions: None = None


class EmbedAllBody(TruncatingBody):
    """The body of a request to `/embed_all`. `prompt_name` must be null.

    If `truncate` is null, the server's setting applies.
    """

    inputs: Texts
    prompt_name: None = None


class PredictBody(TruncatingBody):
    """The body of a request to `/predict`.

    `inputs` is a text, a list of one or two texts (two texts form a pair), or a list of such lists. If `raw_scores` is
    true, the scores are logits. If `truncate` is null, the server's setting applies.
    """

    inputs: str | Pair | Annotated[Items[Pair], pydantic.Field(min_length=1)]
    raw_scores: bool = False


class RerankBody(TruncatingBody):
    """The body of a request to `/rerank`.

    If `raw_scores` is true, the scores are logits. If `return_text` is true, the response contains the texts. If
    `truncate` is null, the server's setting applies.
    """

    query: str
    texts: Items[str]
    raw_scores: bool = False
    return_text: bool = False


class TokenizeBody(StrictBody):
    """The body of a request to `/tokenize`. `prompt_name` must be null."""

    inputs: Texts
    add_special_tokens: bool = True
    prompt_name: None = None


class Rank(pydantic.BaseModel):
    """The score of a text, and the index of the text in the request."""

    index: int
    score: float
    text: str | None = None


class Token(pydantic.BaseModel):
    """A token and its position in the text, in characters."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Info(pydantic.BaseModel):
    """The response from `/info`.

    For a text classifier, `model_type` is `{"classifier": {"id2label", "label2id"}}` or, if there is only one label,
    `{"reranker": {"id2label", "label2id"}}`. For an embedding model, `model_type` is `{"embedding": {"pooling"}}`. For
    all other models, `model_type` is `{}`.
    """

    model_id: str
    model_sha: None
    model_dtype: str
    model_type: dict[str, dict[str, Any]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: None
    docker_label: None


def routes(engine: Engine) -> APIRouter:
    """Returns TEI's routes.

    `/info` and `/tokenize` use the first model of `engine`. Every other route uses the first model that is served for
    the route's task.
    """
    router = APIRouter(tags=["text-embeddings-inference"])

    def check_length(pipe: Pipeline[Any], texts: Sequence[str], truncate: bool | None) -> None:
        """If truncation is off, raises `InputError` for an empty text and for a text or pair that is too long."""
        if engine.limits.truncate if truncate is None else truncate:
            return
        for text in texts:
            if not text.strip():
                raise InputError("the text is empty.")
        tokens = len(pipe.tokenizer.encode(texts[:1], texts[1:] or None)[0][0])
        if tokens > pipe.max_length:
            raise InputError(f"the text has {tokens} tokens; at most {pipe.max_length} are allowed.")

    @router.post("/embed", openapi_extra=documented(EmbedBody), responses={200: {"model": list[list[float]]}})
    async def embed(request: Request) -> Response:
        """Returns sentence embeddings, using the pooling method declared in the model's folder."""
        body = await engine.read(request, EmbedBody)
        pipe = engine.pipeline("feature-extraction")
        prepared = await engine.prepare(
            embedding_length(pipe),
            inputs_of(body.inputs, "inputs"),
            lambda text: sentence_embedding(
                pipe, engine.limits, text, normalize=body.normalize, truncate=body.truncate
            ),
            listed_as="inputs",
        )
        return await engine.respond(await engine.compute(request, pipe, prepared), prepared)

    @router.post("/embed_all", openapi_extra=documented(EmbedAllBody), responses={200: {"model": TokenVectors}})
    async def embed_all(request: Request) -> Response:
        """Returns the vectors of all tokens in each text, including special tokens."""
        body = await engine.read(request, EmbedAllBody)
        pipe = engine.pipeline("feature-extraction")

        def make(text: str) -> TaskRequest[np.ndarray]:
            check_length(pipe, [text], body.truncate)
            return pipe.request(text, {})

        prepared = await engine.prepare(pipe.max_length, inputs_of(body.inputs, "inputs"), make, listed_as="inputs")
        return await engine.respond(await engine.compute(request, pipe, prepared), prepared)

    @router.post(
        "/predict",
        openapi_extra=documented(PredictBody),
        responses={200: {"model": list[LabelScore] | list[list[LabelScore]]}},
    )
    async def predict(request: Request) -> Response:
        """Returns the scores of all labels, highest first."""
        body = await engine.read(request, PredictBody)
        pipe: Pipeline[SequenceClassification] = engine.pipeline("text-classification")
        several = not isinstance(body.inputs, str) and not isinstance(body.inputs[0], str)
        entries: list[Any] = body.inputs if several else [body.inputs]  # type: ignore[assignment]

        def make(entry: str | list[str]) -> TaskRequest[Any]:
            texts = [entry] if isinstance(entry, str) else entry
            check_length(pipe, texts, body.truncate)
            return pipe.request(tuple(texts), {"top_k": None, "function_to_apply": "none" if body.raw_scores else None})

        prepared = await engine.prepare(pipe.max_length, entries, make, listed_as="inputs" if several else "")
        results = await engine.compute(request, pipe, prepared)
        return await engine.respond(results if several else results[0], prepared)

    @router.post("/rerank", openapi_extra=documented(RerankBody), responses={200: {"model": list[Rank]}})
    async def rerank(request: Request) -> Response:
        """Returns the scores of texts for a query, highest first. The model must have exactly one label."""
        body = await engine.read(request, RerankBody)
        pipes = [pipe for served in engine.models.values() if (pipe := served.pipes.get("text-classification"))]
        if not (rerankers := [pipe for pipe in pipes if pipe.config.num_labels == 1]):
            raise engine.other_task("reranking, which is text-classification with one label")
        pipe = rerankers[0]
        if not body.texts:
            raise Refused(422, "invalid_input", "texts is empty.")

        def make(text: str) -> TaskRequest[Any]:
            check_length(pipe, [body.query, text], body.truncate)
            function = "none" if body.raw_scores else "sigmoid"
            return pipe.request((body.query, text), {"top_k": None, "function_to_apply": function})

        prepared = await engine.prepare(
            pipe.max_length, body.texts, make, parameters={"query": body.query}, listed_as="texts"
        )
        results = await engine.compute(request, pipe, prepared)
        ranks = [
            {"index": i, "score": result[0]["score"]} | ({"text": text} if body.return_text else {})
            for i, (text, result) in enumerate(zip(body.texts, results, strict=True))
        ]
        return await engine.respond(sorted(ranks, key=lambda rank: -rank["score"]), prepared)

    @router.get("/info", responses={200: {"model": Info}})
    async def info() -> Response:
        """Describes the first model and the server's limits."""
        served = next(iter(engine.models.values()))
        pipe = next(iter(served.pipes.values()))
        kind: dict[str, Any] = {}
        longest = pipe.max_length
        if isinstance(pipe.task, SequenceClassification):
            labels = pipe.task.labels
            names = {
                "id2label": {str(i): label for i, label in enumerate(labels)},
                "label2id": {label: i for i, label in enumerate(labels)},
            }
            kind = {"reranker" if len(labels) == 1 else "classifier": names}
        elif "feature-extraction" in served.pipes and (
            embedding := declared_embedding(served.pipes["feature-extraction"])
        ):
            kind = {"embedding": {"pooling": embedding.pooling}}
            longest = embedding_length(served.pipes["feature-extraction"])
        limits = engine.limits
        return await engine.respond(
            {
                "model_id": served.name,
                "model_sha": None,
                "model_dtype": next(iter(served.pipes.values())).dtype,
                "model_type": kind,
                "max_concurrent_requests": limits.max_connections,
                "max_input_length": longest,
                "max_batch_tokens": limits.max_queue_tokens,
                "max_batch_requests": None,
                "max_client_batch_size": limits.max_inputs,
                "auto_truncate": limits.truncate,
                "tokenization_workers": 1,
                "version": __version__,
                "sha": None,
                "docker_label": None,
            }
        )

    @router.post("/tokenize", openapi_extra=documented(TokenizeBody), responses={200: {"model": list[list[Token]]}})
    async def tokenize(request: Request) -> Response:
        """Returns the tokens of each text. Texts are not truncated."""
        body = await engine.read(request, TokenizeBody)
        tokenizer = next(iter(next(iter(engine.models.values())).pipes.values())).tokenizer

        def tokens(texts: list[str]) -> list[list[dict[str, Any]]]:
            for text in texts:
                engine.check_size(text)
            rows = tokenizer.encode(texts, add_special_tokens=body.add_special_tokens)
            engine.check_tokens(sum(len(row) for (row,) in rows))
            return [
                [
                    {"id": id_, "text": token if special else text[start:stop], "special": bool(special)}
                    | {"start": None if special else start, "stop": None if special else stop}
                    for id_, token, special, (start, stop) in zip(
                        row.ids, row.tokens, row.special_tokens_mask, row.offsets, strict=True
                    )
                ]
                for text, (row,) in zip(texts, rows, strict=True)
            ]

        with refusing(body.inputs):
            engine.check_count("the list of inputs", body.inputs)
            content = await engine.threaded(tokens, inputs_of(body.inputs, "inputs"))
        return await engine.respond(content, large=True)

    return router
