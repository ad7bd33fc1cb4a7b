"""What the server accepts, and how it refuses the rest in the format that the clients of a route expect."""

from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

OPENAI = ("/v1/embeddings", "/v1/models")
"""The routes of OpenAI's API. Longer paths that begin with one of them belong to it, too."""
TEI = ("/embed", "/embed_all", "/predict", "/rerank", "/info", "/tokenize")
"""The routes of text-embeddings-inference."""


class Refused(Exception):
    """Raised to refuse a request. It holds the HTTP status, the error code and the message of the response.

    The message must not quote the texts of the client.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def response(self, path: str) -> JSONResponse:
        """The response to a request for a path, in the format of the API that the path belongs to."""
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
    """What the server accepts, and how long it works on a request.

    Attributes:
        wait: When a request reaches an idle server, the server waits this many seconds for others, to compute them
            together.
        timeout: A time limit in seconds, applied three times. If the body of a request does not arrive in time, the
            status is 408. If the answer is not ready in time after that, the status is 504. If the client does not read
            the answer in time, the connection is closed.
        max_body: The maximum size of the body of a request, in bytes.
        max_inputs: The maximum number of inputs of a request.
        max_characters: The maximum number of characters of an input.
        max_tokens: The maximum number of tokens that the model may process for a request, summed over all its rows.
        max_answer: The maximum size of the answer to a request, in bytes. The size is estimated before the computation.
        max_queue_tokens: The maximum number of tokens that the model may have to process for all unanswered requests. A
            request that would exceed it is refused with status 429. One request counts as three quarters of it at most,
            so that it leaves room for others.
        max_connections: The maximum number of open connections. When another client connects, the server closes the
            connection that has been idle longest.
        truncate: Whether the routes of OpenAI and text-embeddings-inference truncate texts that are too long, unless
            the request says otherwise. If false, such texts are refused.
        accept_token_ids: Whether the routes for embeddings accept token ids. Clients may send the ids of another
            model's tokenizer, and the server cannot detect this.
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
