"""Settings of a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.types import NonNegativeFloat, PositiveFloat, PositiveInt

from bert_jax.errors import listed, quoted
from bert_jax.settings import Mesh, Patterns
from bert_jax.yaml_file import SettingsFile


class Serving(SettingsFile):
    """A server of one or several models."""

    models: tuple[str, ...] = ()
    """The models: folders, ids on the Hub, or bert-mini-cased. By default, google-bert/bert-base-cased or, if that is
    not cached and the Hub does not answer, bert-mini-cased."""
    names: Mapping[str, str] = {}
    """Maps entries of `models` to the names that clients use. By default, the name is the entry itself."""
    revision: str | None = None
    """Branch, tag or commit on the Hub, if there is one model."""
    ignore: Patterns = ()
    """Tensors in the checkpoint that are not loaded: regular expressions that match their whole names."""
    tasks: tuple[str, ...] = ()
    """Tasks to serve; by default, each model serves the tasks that it has heads for. The first task of the first model
    is served at /score, too."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of the machine."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """Port to listen on; 0 for any free port."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Dtype of the large weights."""
    mesh: Mesh | None = None
    """How the devices of this process share the work. By default, all accelerators share the rows. On CPUs, one device
    is used."""
    api_key: str | None = None
    """The key that clients must send in the header `Authorization` as a bearer token, for all paths but /health. By
    default, there is none. The environment variable BERT_JAX_API_KEY overrides this setting."""
    api_key_file: Path | None = None
    """A file that contains the key, instead of `api_key`."""
    allowed_hosts: tuple[str, ...] = ()
    """Values of the header Host that the server accepts, except on /health; `*.example.com` accepts all subdomains. The
    default is any value or, if the server listens on a loopback address, localhost, 127.0.0.1 and [::1]."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may read answers, such as https://example.com; `*` for all."""
    wait: NonNegativeFloat = 0.0005
    """When a request reaches an idle server, the server waits this many seconds for others to share its batch."""
    timeout: PositiveFloat = 30.0
    """A time limit in seconds. If the body of a request does not arrive in time, the status is 408. If the answer is
    not ready in time, the status is 504. If the client does not read it in time, the connection is closed."""
    max_body: PositiveInt = 2**20
    """Maximum size of the body of a request, in bytes."""
    max_inputs: PositiveInt = 2048
    """Maximum number of inputs per request."""
    max_characters: PositiveInt = 20_000
    """Maximum number of characters per input."""
    max_tokens: PositiveInt = 2**15
    """Maximum number of tokens that the model may process for a request, summed over all its rows. Several inputs,
    windows, targets or joint masks need several rows. A request that exceeds the maximum is refused with status 413."""
    max_answer: PositiveInt = 2**24
    """Maximum size of an answer, in bytes. The size is estimated before the computation, and a request that asks for
    more is refused with status 413."""
    max_queue_tokens: Annotated[int, Field(ge=16)] = 2**15
    """Maximum number of tokens that the model may have to process for all unanswered requests. A request that would
    exceed it is refused with status 429. A single request counts for at most three quarters of this maximum."""
    max_connections: PositiveInt = 1024
    """Maximum number of open connections. When another client connects, the one idle for the longest time is closed."""
    truncate: bool = False
    """Whether the routes of OpenAI and text-embeddings-inference truncate texts that are too long, unless the request
    says otherwise. If false, such texts are refused."""
    accept_token_ids: bool = False
    """Whether the routes for embeddings accept token ids instead of texts. They must be ids of the model's own
    tokenizer; ids of another one give wrong results without an error."""

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
