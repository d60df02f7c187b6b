"""What goes wrong with a request, and how the protocols tell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgemoe import errors
from edgemoe.errors import ContextLengthError, EdgemoeError, OptionError, ReadError, TokenizerError
from edgemoe.protocols.fields import FieldError

RETRY_SECONDS = 5
"""After which a request that found a full queue may be sent again."""


@dataclass(frozen=True, slots=True)
class Problem:
    """status: of HTTP. message: for people. code: for programs. param: the field that is wrong.
    more: further fields of the error. retry_after: seconds, where it may be tried again."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    retry_after: int | None = None


def problem_of(error: BaseException) -> Problem:
    """What an error means to who sent the request. What is not ours says nothing of its inside."""
    if isinstance(error, FieldError):
        return Problem(400, str(error), error.code, error.field or None)
    if isinstance(error, ContextLengthError):
        return _too_long(error)
    if isinstance(error, (OptionError, TokenizerError)):
        return Problem(400, str(error), "invalid_value")
    if isinstance(error, errors.OverloadedError):
        return Problem(503, str(error), "overloaded", retry_after=RETRY_SECONDS)
    if isinstance(error, ReadError):
        return Problem(500, str(error), "read_error")
    if isinstance(error, EdgemoeError):
        return Problem(500, str(error), "server_error")
    if isinstance(error, MemoryError):
        return Problem(500, "out of memory", "server_error")
    return Problem(500, "internal error", "server_error")


def _too_long(error: ContextLengthError) -> Problem:
    tokens, context = error.prompt_tokens, error.context
    if tokens is None or context is None:
        return Problem(400, str(error), "context_length_exceeded", "messages")
    # Agents look for these words and numbers before they shorten a conversation.
    message = (
        f"prompt is too long: {tokens} tokens > {context} maximum; it exceeds the model's context length "
        f"(context_length_exceeded; n_prompt_tokens = {tokens}, n_ctx = {context}; the server's option is -c)"
    )
    more = {"n_prompt_tokens": tokens, "n_ctx": context}
    return Problem(400, message, "context_length_exceeded", more=more)


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_error(problem: Problem) -> dict[str, Any]:
    """OpenAI's shape, also of endpoints that nobody else has."""
    kind = _OPENAI_TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    error = {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}
    return {"error": {**error, **problem.more}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(problem: Problem) -> dict[str, Any]:
    """Anthropic's shape."""
    kind = _ANTHROPIC_TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message, **problem.more}, "request_id": None}
