"""The server's limits, and error responses in the format that the clients of each API expect."""

from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

OPENAI = ("/v1/embeddings", "/v1/models")
"""The routes of OpenAI's API. Paths below these routes, such as `/v1/models/NAME`, are also part of the API."""
TEI = ("/embed", "/embed_all", "/predict", "/rerank", "/info", "/tokenize")
"""The routes of text-embeddings-inference."""


class Refused(Exception):
    """Raised to refuse a request. Contains the HTTP status, the error code and the message of the response.

    The message must not quote the client's texts.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def response(self, path: str) -> JSONResponse:
        """Returns the response to a request for `path`, in the format of the API to which the path belongs."""
        message, status = str(self), self.status
        content: dict[str, Any] = {"error": {"code": self.code, "message": message}}
        if any(path == route or path.startswith(f"{route}/") for route in OPENAI):
            kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
            content = {"error": {"message": message, "type": kind, "param": None, "code": self.code}}
            status = 400 if status in (413, 422) else status
        elif path in TEI:
            kinds = {422: "Tokenizer", 424: "Backend", 429: "Overloaded", 503: "Unhealthy"}
            content = {"error": message, "error_type": kinds.get(status, "Validation" if status < 500 else "Backend")}
        return JSONResponse(content, status, self.headers)


@dataclass(frozen=True)
class Limits:
    """The server's limits on the size, cost and duration of requests.

    Attributes:
        wait: If a request arrives while the server is idle, the server waits this many seconds for other requests and
            then processes all of them together.
        timeout: The time limit, in seconds, for each of three phases of a request. If the body does not arrive in time,
            the server responds with status 408. After that, if the response is not ready in time, the server responds
            with status 504. If the client does not read the response in time, the server closes the connection.
        max_body: The maximum size of a request's body, in bytes.
        max_inputs: The maximum number of inputs per request.
        max_characters: The maximum number of characters per input.
        max_tokens: The maximum number of tokens that the model may process for a request, summed over all rows of the
            request.
        max_answer: The maximum size of the response to a request, in bytes. The size is estimated before the
            computation.
        max_queue_tokens: The maximum number of tokens to process, summed over all unanswered requests. A request that
            would raise the total above this number is refused with status 429. A single request counts as at most three
            quarters of this number, so that there is room for others.
        max_connections: The maximum number of open connections. If this number is exceeded, the server closes the
            connection that has been idle the longest.
        truncate: Whether the OpenAI and text-embeddings-inference routes truncate texts that are too long. If false,
            these routes refuse such texts. The `truncate` field of a text-embeddings-inference request overrides this
            setting.
        accept_token_ids: Whether the embedding routes accept token ids. The server cannot detect whether a client sends
            ids from another model's tokenizer.
    """

    wait: float = 0.0005
    timeout: float = 30.0
    max_body: int = 2**20
    max_inputs: int = 2048
    max_characters: int = 20_000
    max_tokens: int = 2**15
    max_answer: int = 2**24
    max_queue_tokens: int = 2**15
    max_connections: int = 1024
    truncate: bool = False
    accept_token_ids: bool = False
