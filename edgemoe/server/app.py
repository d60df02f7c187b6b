"""The server as an ASGI application: what answers at which path."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import resource
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgemoe.errors import ContextLengthError, EdgemoeError
from edgemoe.model import Model
from edgemoe.protocols import chat_completions, completions, messages, responses
from edgemoe.protocols.answers import AnswerStream, Reply
from edgemoe.protocols.fields import FieldError, Fields
from edgemoe.protocols.problems import Problem, problem_of
from edgemoe.protocols.requests import ChatRequest, TextRequest
from edgemoe.server.answering import AnswerResponse, Answers, now
from edgemoe.server.bodies import Refused, read_json
from edgemoe.server.metrics import Metrics
from edgemoe.server.page import page
from edgemoe.server.security import HostCheck, KeyCheck, problem_response
from edgemoe.server.settings import ServerSettings
from edgemoe.text.sampling import SamplingOptions

Endpoint = Callable[[Request], Awaitable[Response | AnswerResponse]]


def create_app(model: Model, settings: ServerSettings) -> Starlette:
    """The application. Its `state.answers` are those under way; `stop()` ends them."""
    return _Server(model, settings).application()


class _Server:
    """What the endpoints share."""

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self.metrics = Metrics()
        self.answers = Answers(settings, self.metrics)
        self.started = now()
        merged = SamplingOptions.merged({}, model.generation_defaults)
        self.defaults = {known.name: getattr(merged, known.name) for known in dataclasses.fields(merged)}

    def application(self) -> Starlette:
        chat = functools.partial(self.chat, chat_completions.parse, chat_completions.ChatStream)
        respond = functools.partial(self.chat, responses.parse, responses.ResponseStream)
        message = functools.partial(self.chat, messages.parse, messages.MessageStream)
        routes = [
            _route("/v1/chat/completions", "POST", chat),
            _route("/v1/completions", "POST", self.complete),
            _route("/v1/responses", "POST", respond),
            _route("/v1/messages", "POST", message),
            _route("/v1/messages/count_tokens", "POST", self.count_tokens),
            _route("/v1/models", "GET", self.models),
            _route("/v1/models/{name:path}", "GET", self.one_model),
            _route("/tokenize", "POST", self.tokenize),
            _route("/detokenize", "POST", self.detokenize),
            _route("/health", "GET", self.health),
            _route("/metrics", "GET", self.metrics_text),
            _route("/engine", "GET", self.engine),
            _route("/openapi.json", "GET", self.openapi),
            _route("/", "GET", self.page),
        ]
        settings = self.settings
        middleware = [Middleware(_Counted, metrics=self.metrics, paths={route.path for route in routes})]
        if settings.allowed_hosts is not None:
            middleware.append(Middleware(HostCheck, allowed=settings.allowed_hosts))
        if settings.cors_origins:
            middleware.append(
                Middleware(
                    CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
                )
            )
        if settings.api_keys:
            middleware.append(Middleware(KeyCheck, keys=settings.api_keys))
        handlers: Any = {
            Refused: _on_refused,
            EdgemoeError: _on_error,
            HTTPException: _on_http_error,
            Exception: _on_error,
        }
        app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
        app.state.answers = self.answers
        return app

    # -- answers ------------------------------------------------------------------------------------------------

    async def chat(
        self,
        parse: Callable[[object], ChatRequest],
        stream: Callable[[ChatRequest, Reply], AnswerStream],
        request: Request,
    ) -> AnswerResponse:
        asked = self.capped(parse(await read_json(request, self.settings)))
        template = self.model.tokenizer.chat_template or ""
        starts = [
            functools.partial(self.model.chat_parts, asked.messages, **asked.arguments(choice, template))
            for choice in range(asked.n if asked.messages else 0)
        ]
        return self.answer(request, asked, starts, lambda reply: stream(asked, reply))

    async def complete(self, request: Request) -> AnswerResponse:
        asked = self.capped(completions.parse(await read_json(request, self.settings)))
        starts = [
            functools.partial(self.model.generate, asked.prompts[choice // asked.n], **asked.arguments(choice))
            for choice in range(asked.choices)
        ]
        return self.answer(
            request, asked, starts, lambda reply: completions.TextStream(asked, reply, self.model.tokenizer.decode)
        )

    def capped(self, asked: Any) -> Any:
        """With the server's limit of tokens."""
        cap = self.settings.max_tokens
        if cap is None or (asked.max_tokens is not None and asked.max_tokens <= cap):
            return asked
        return dataclasses.replace(asked, max_tokens=cap)

    def answer(
        self,
        request: Request,
        asked: ChatRequest | TextRequest,
        starts: Sequence[Callable[[], Any]],
        tell: Callable[[Reply], AnswerStream],
    ) -> AnswerResponse:
        def told(prompt_tokens: int) -> AnswerStream:
            return tell(
                Reply(
                    id=secrets.token_hex(12),
                    created=now(),
                    model=self.settings.model_name,
                    prompt_tokens=prompt_tokens,
                    defaults=self.defaults,
                    count_tokens=lambda text: len(self.model.tokenizer.encode(text)),
                )
            )

        wanted, hidden = asked.logprobs is not None, self.model.tokenizer.end_ids
        return AnswerResponse(self.answers, request.url.path, starts, told, asked.stream, wanted, hidden)

    # -- tokens -------------------------------------------------------------------------------------------------

    async def count_tokens(self, request: Request) -> Response:
        asked = messages.parse_prompt(await read_json(request, self.settings))
        arguments = {**asked.arguments(0, self.model.tokenizer.chat_template or ""), "max_tokens": 0}

        def count() -> int:
            try:
                with self.model.chat_parts(asked.messages, **arguments) as answer:
                    return answer.result.prompt_tokens
            except ContextLengthError as error:
                if error.prompt_tokens is None:
                    raise
                return error.prompt_tokens

        return JSONResponse({"input_tokens": await self.in_thread(count)})

    async def tokenize(self, request: Request) -> Response:
        fields = Fields(await read_json(request, self.settings))
        text = fields.need_text("content")
        add_special, parse_special = fields.flag("add_special"), fields.flag("parse_special", True)
        with_pieces = fields.flag("with_pieces")
        tokenizer = self.model.tokenizer
        ids = await self.in_thread(lambda: tokenizer.encode(text, add_special, parse_special))
        if not with_pieces:
            return JSONResponse({"tokens": ids})
        return JSONResponse({"tokens": [{"id": token, "piece": _piece(tokenizer.spelling(token))} for token in ids]})

    async def detokenize(self, request: Request) -> Response:
        fields = Fields(await read_json(request, self.settings))
        fields.need("tokens")
        tokens = fields.items("tokens", self.settings.max_body)
        vocabulary = self.model.spec.vocab_size
        for number, token in enumerate(tokens):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise FieldError(f"tokens[{number}]", f"= {str(token)[:40]} is not a token: 0 to {vocabulary - 1}")
        text = await self.in_thread(lambda: self.model.tokenizer.decode(tokens, skip_special=False))
        return JSONResponse({"content": text})

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        return await anyio.to_thread.run_sync(function, limiter=self.answers.threads)

    # -- the server ---------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        entry = self.model_entry()
        # `models` is Codex's list of models with their settings: none, so that it takes its own defaults.
        listed = {"object": "list", "data": [entry], "models": []}
        return JSONResponse({**listed, "first_id": entry["id"], "last_id": entry["id"], "has_more": False})

    async def one_model(self, request: Request) -> Response:
        """Whatever its name: this is the model that answers to it."""
        return JSONResponse({**self.model_entry(), "id": request.path_params["name"]})

    def model_entry(self) -> dict[str, Any]:
        name, spec = self.settings.model_name, self.model.spec
        created = _date(self.started)
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "edgemoe",
            "context_length": self.model.context,
            "max_model_len": self.model.context,
            "type": "model",  # from here on Anthropic's
            "display_name": name,
            "created_at": created,
            "meta": {"family": spec.family, "n_vocab": spec.vocab_size, "n_ctx": self.model.context},
        }

    async def health(self, request: Request) -> Response:
        if self.answers.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_text(self, request: Request) -> Response:
        generated = self.generated()

        def text() -> str:
            return self.metrics.text(self.model.counters(), self.status(), self.memory(), generated(), self.device())

        return PlainTextResponse(await self.in_thread(text), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def engine(self, request: Request) -> Response:
        generated = self.generated()
        return JSONResponse(await self.in_thread(lambda: self.engine_report(generated())))

    def generated(self) -> Callable[[], int]:
        """What counts the tokens of all answers so far, those under way included; it may be called on a thread."""
        # Both at once, on the event loop: an answer is either among the counted ones or under way.
        counted, under_way = self.metrics.generated_tokens, self.answers.under_way()
        return lambda: counted + sum(answer.result.generated_tokens for answer in under_way)

    def engine_report(self, generated_tokens: int) -> dict[str, Any]:
        """What the page shows beside the conversation. generated_tokens: of all answers, those under way included."""
        layers = self.model.spec.layers
        levels, reads = self.model.engine.residency()
        return {
            "status": {"answers": self.metrics.running, **self.status()},
            "counters": {
                **self.model.counters(),
                "tokens": self.model.engine.counters().tokens,
                "generated_tokens": generated_tokens,
            },
            "memory": self.memory(),
            "device": self.device(),
            "layers": len(layers),
            "experts": max((layer.experts for layer in layers), default=0),
            "resident": _base64(levels.astype("u1")),
            "reads": _base64(reads.clip(max=_MOST_READS).astype("<u4")),
            "model": {"name": self.settings.model_name, "context": self.model.context, "quality": self.model.quality},
        }

    def status(self) -> dict[str, int]:
        """Of the scheduler."""
        return self.model.status()

    def memory(self) -> dict[str, int]:
        """In bytes: the limit, the process's peak so far, what is set aside for experts."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"limit": self.model.budget.limit, "peak": peak, "cache": self.model.budget.cache_bytes}

    def device(self) -> dict[str, Any] | None:
        """What computes beside the processor: its name, layers (the head as one), experts that it holds, bytes."""
        use = self.model.device
        if use is None:
            return None
        return {
            "name": use.name,
            "layers": use.budget.layers,
            "experts": use.budget.slots,
            "memory": use.budget.taken,
        }

    async def openapi(self, request: Request) -> Response:
        return Response(_OPENAPI.read_bytes(), media_type="application/json")

    async def page(self, request: Request) -> Response:
        body, headers = page()
        return Response(body, headers=headers)


_MOST_READS = np.uint64((1 << 32) - 1)
_OPENAPI = Path(__file__).with_name("openapi.json")


class _Counted:
    """Counts requests by path and status; paths that are not the server's are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_request(path, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def _route(path: str, method: str, endpoint: Endpoint) -> Route:
    async def called(request: Request) -> Any:
        return await endpoint(request)

    return Route(path, called, methods=[method])


def _piece(data: bytes) -> str | list[int]:
    """llama.cpp's way: text, or bytes where they are not whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _date(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _on_refused(request: Request, error: Refused) -> Response:
    return problem_response(request.url.path, error.problem)


async def _on_error(request: Request, error: Exception) -> Response:
    return problem_response(request.url.path, problem_of(error))


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    names = {404: "there is nothing at this path", 405: f"{request.method} is not what this path takes"}
    problem = Problem(error.status_code, names.get(error.status_code, str(error.detail)), "not_found")
    response = problem_response(request.url.path, problem)
    response.headers.update(error.headers or {})
    return response
