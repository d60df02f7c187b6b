"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """model_name: what responses call the model. api_keys: one of them must come with every request but /health; none:
    everybody is served. allowed_hosts: names that the Host header may have; None for any. cors_origins: web pages that
    may read answers, "*" for all. max_tokens: the most that an answer may have, whatever a request says.

    max_body: bytes of a request. body_seconds: until it must have come. request_seconds: until an answer must be
    complete, None for no limit. send_seconds: that a client may take to read what is sent before it counts as gone.
    keepalive_seconds: a stream is never silent for longer. prompt_seconds: that a failure has to show itself before a
    stream begins with status 200.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()
    max_tokens: int | None = None
    max_body: int = 32 << 20
    body_seconds: float = 60.0
    request_seconds: float | None = None
    send_seconds: float = 300.0
    keepalive_seconds: float = 5.0
    prompt_seconds: float = 0.2
