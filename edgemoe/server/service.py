"""A server from its socket to its end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
import uvicorn.config
from starlette.applications import Starlette

from edgemoe.errors import OptionError
from edgemoe.model import Model
from edgemoe.server.app import create_app
from edgemoe.server.settings import ServerSettings

# Seconds that responses have to end after the generations have.
_GRACE = 10
_KEPT_ALIVE = 30
_LARGEST_HEAD = 64 << 10


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet; port 0 takes a free one. Raises OptionError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise OptionError(f"--host {host}: {error}") from None
    # Where a name has addresses of both kinds (localhost), clients expect the older one.
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # From now on nobody else can have it, while the model is being loaded.
        bound.listen(128)
    except OSError as error:
        bound.close()
        raise OptionError(f"{host}:{port}: {error.strerror or error}; --port names another one, 0 any") from None
    return bound


class _Uvicorn(uvicorn.Server):
    """Signals are handled by `serve` alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(
    model: Model, settings: ServerSettings, bound: socket.socket, ready: Callable[[], None], access_log: bool = False
) -> int | None:
    """Serves until SIGINT or SIGTERM, which end the generations under way; a second one waits for nothing. Gives back
    the signal."""
    app = create_app(model, settings)
    server = make_server(app, access_log)
    ended_by: list[int] = []

    def end(number: int) -> None:
        ended_by.append(number)
        server.force_exit = len(ended_by) > 1
        server.should_exit = True
        app.state.answers.stop()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number)
        ready()
        await server.serve(sockets=[bound])

    asyncio.run(run())
    return ended_by[0] if ended_by else None


def make_server(app: Starlette, access_log: bool = False) -> uvicorn.Server:
    """What takes the connections, with its limits. access_log: a line on stderr for each request."""
    log_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config = uvicorn.Config(
        app,
        log_config=log_config,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        timeout_keep_alive=_KEPT_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
    )
    return _Uvicorn(config)
