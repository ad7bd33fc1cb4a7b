"""Server settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.types import NonNegativeFloat, PositiveFloat, PositiveInt

from bert_jax.errors import listed, quoted
from bert_jax.settings import Mesh, Patterns
from bert_jax.yaml_file import SettingsFile


class Serving(SettingsFile):
    """Settings for a server that serves one or more models."""

    models: tuple[str, ...] = ()
    """The models: folders, ids on the Hugging Face Hub, or the embedded model (`bert-mini-cased`). The default is
    `google-bert/bert-base-cased` or, if that model is not cached and the Hub does not respond, `bert-mini-cased`."""
    names: Mapping[str, str] = {}
    """Maps entries of `models` to the names that clients use. By default, the name of a model is its entry in
    `models`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. It can be set only if there is one model."""
    ignore: Patterns = ()
    """Regular expressions that match the names of tensors to skip in the models' checkpoints; each expression must
    match the whole name."""
    tasks: tuple[str, ...] = ()
    """Tasks to serve. By default, each model serves the tasks for which it has heads. The first task of the first model
    is also served at `/score`."""
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` for all addresses of the machine."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """Port to listen on; 0 for any free port."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Dtype of the large weights."""
    mesh: Mesh | None = None
    """How the work is divided among the devices of this process. By default, the rows are divided among all
    accelerators; on CPUs, one device is used."""
    api_key: str | None = None
    """The key that clients must send as a bearer token in the `Authorization` header, for all paths except `/health`.
    By default, no key is required. The environment variable `BERT_JAX_API_KEY` overrides this setting."""
    api_key_file: Path | None = None
    """A file that contains the API key. Do not set both this and `api_key`."""
    allowed_hosts: tuple[str, ...] = ()
    """Values of the `Host` header that the server accepts; `*.example.com` accepts all subdomains. `/health` accepts
    any value. By default, the other paths also accept any value or, if the server listens on a loopback address, only
    `localhost`, `127.0.0.1` and `[::1]`."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may read responses, such as https://example.com; `["*"]` for all."""
    wait: NonNegativeFloat = 0.0005
    """When a request reaches an idle server, the server waits this many seconds for more requests to add to the
    batch."""
    timeout: PositiveFloat = 30.0
    """Time limit in seconds. If the body of a request does not arrive in time, the status is 408. If the response is
    not ready in time, the status is 504. If the client does not read the response in time, the connection is closed."""
    max_body: PositiveInt = 2**20
    """Maximum size of a request body, in bytes."""
    max_inputs: PositiveInt = 2048
    """Maximum number of inputs per request."""
    max_characters: PositiveInt = 20_000
    """Maximum number of characters per input."""
    max_tokens: PositiveInt = 2**15
    """Maximum number of tokens that the model may process for a request, summed over the request's rows. A request with
    several inputs, windows, targets or joint masks needs several rows. A request that exceeds the maximum is rejected
    with status 413."""
    max_answer: PositiveInt = 2**24
    """Maximum size of a response, in bytes. The size is estimated before the computation, and a request that would
    exceed the maximum is rejected with status 413."""
    max_queue_tokens: Annotated[int, Field(ge=16)] = 2**15
    """Maximum total number of tokens that the models may have to process for all unanswered requests. A request that
    would exceed the maximum is rejected with status 429. A single request counts as at most three quarters of the
    maximum."""
    max_connections: PositiveInt = 1024
    """Maximum number of open connections. If this number is reached and another client connects, the server closes the
    connection that has been idle the longest."""
    truncate: bool = False
    """Whether the OpenAI and text-embeddings-inference routes truncate texts that are too long. If false, such texts
    are rejected. The `truncate` field of a text-embeddings-inference request overrides this setting."""
    accept_token_ids: bool = False
    """Whether the embedding routes accept token ids instead of texts. The ids must come from the model's tokenizer; ids
    from another tokenizer lead to wrong results without an error."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("api_key and api_key_file are both set; expected one of them")
        if self.revision and len(self.models) > 1:
            raise ValueError("revision is set for several models; expected one model")
        if unknown := [model for model in self.names if model not in self.models]:
            raise ValueError(f"names has {quoted(unknown[0])}, which is not among the models: {listed(self.models)}")
        names = [self.names.get(model, model) for model in self.models]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models have the name {quoted(twice[0])}; give each its own name")
        return self
