"""A worker's frontend process: the HTTP server, the tokenizer, and below it an engine process for each rank.

It starts the ranks as children and is their only client: it talks to the leader of each attention group. When a rank ends,
whatever the reason, the open requests fail, the other ranks are killed, and this process ends too: a worker without all of its
engine is no worker. All kinds run this; what differs is in the arguments. Neighbours: `engine_processes` (the children),
`engine_groups` (what is asked of them), `app` (what is served), `registration` (how a router learns of it).
"""

import asyncio
import logging
import tempfile
from typing import Any, Final, Protocol

import uvloop
from msgspec import Struct
from msgspec.structs import replace

from common.config import EngineOptions, ModelOptions, RegistrationOptions, ServerOptions, to_flags
from common.messages import WorkerKind, leg_of
from common.models.config import resolve_checkpoint
from common.observability.logging import configure_logging
from common.process import EXIT_USAGE, ensure_port_free
from common.ranks import Ranks
from common.server.app import WorkerApp
from common.server.engine_client import EngineClient
from common.server.engine_groups import EngineGroups
from common.server.engine_processes import EngineProcesses
from common.server.http import start_server, stop_on_signals
from common.server.registration import Registration
from common.server.tokenizer import Tokenizer
from common.wire import FrontendChannel, engine_endpoint

log = logging.getLogger(__name__)

_LAST_WORDS_S: Final = 2.0
"""How long the answers of requests that have ended, or have just been failed, may take to be written."""


class WorkerConfig(Protocol):
    """What the frontend reads of a role's config."""

    @property
    def model(self) -> ModelOptions:
        """Which model."""

    @property
    def engine(self) -> EngineOptions:
        """Which ranks there are, and when they count as stuck."""

    @property
    def server(self) -> ServerOptions:
        """Where to listen."""

    @property
    def registration(self) -> RegistrationOptions:
        """Which router to join."""


def run_frontend(
    kind: WorkerKind, config: WorkerConfig, *, engine_module: str, bootstrap_port: int | None = None
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. A rank is `python -m engine_module FOLDER RANK flags...`.

    Raises UsageError for what the operator can mend.
    """
    configure_logging(kind, config.server.log_level)
    ranks = config.engine.ranks
    registration = Registration(kind, config.registration, config.server, bootstrap_port)
    ensure_port_free(config.server.host, config.server.port)
    tokenizer = Tokenizer.load(resolve_checkpoint(config.model.model, weights=False))
    return uvloop.run(_serve(kind, config, ranks, tokenizer, registration, engine_module, bootstrap_port))


async def _serve(
    kind: WorkerKind,
    config: WorkerConfig,
    ranks: Ranks,
    tokenizer: Tokenizer,
    registration: Registration,
    engine_module: str,
    bootstrap_port: int | None,
) -> int:
    stop, leg = stop_on_signals(), leg_of(kind)
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        channels = [FrontendChannel(engine_endpoint(folder, group)) for group in range(ranks.dp)]
        engine = EngineGroups([EngineClient(channel, config.engine, leg=leg) for channel in channels], ranks, leg=leg)
        assert isinstance(config, Struct)
        # Anybody on this host can read a process's flags, and the engine has no use for the keys.
        server, no_router = replace(config.server, api_key=""), RegistrationOptions()
        flags = to_flags(replace(config, server=server, registration=no_router))
        processes = await EngineProcesses.start(engine_module, folder, ranks.tp, flags)
        ready = asyncio.create_task(engine.ready())
        receiving = asyncio.create_task(engine.run())
        losing = asyncio.create_task(processes.until_one_ends())
        stopping = asyncio.create_task(stop.wait())
        ends: set[asyncio.Task[Any]] = {losing, stopping, receiving}
        try:
            await asyncio.wait({ready, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                app = WorkerApp(
                    kind,
                    engine,
                    ready.result(),
                    tokenizer,
                    config.model,
                    config.server,
                    config.engine,
                    bootstrap_port=bootstrap_port,
                )
                await _run_until_end(app, config.server, engine, registration, ends, stopping)
            if receiving.done():
                receiving.result()
            if stopping.done():
                # From now on the ranks end one after the other.
                losing.cancel()
                engine.shut_down()
                return 0
            if not processes.has_refused_usage:
                log.error("the engine has ended: %s", losing.result())
                return 1
            return EXIT_USAGE
        finally:
            losing.cancel()
            await processes.wait(config.server.shutdown_deadline_s)
            for task in (ready, receiving, stopping):
                task.cancel()
            for channel in channels:
                channel.close()


async def _run_until_end(
    app: WorkerApp,
    options: ServerOptions,
    engine: EngineGroups,
    registration: Registration,
    ends: "set[asyncio.Task[Any]]",
    stopping: "asyncio.Task[Any]",
) -> None:
    """Serve until one of `ends`. If it is `stopping`, what is open may end within the shutdown deadline; else it fails at once.

    Either way whoever waits gets an answer before the connections are closed.
    """
    runner = await start_server(app.application(), options, shutdown_deadline_s=_LAST_WORDS_S)
    watching = asyncio.create_task(engine.watch())
    registering = asyncio.create_task(registration.run())
    try:
        await asyncio.wait({watching, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            drained = asyncio.create_task(_leave_and_drain(app, registration, registering, options))
            others = {drained, watching, *ends} - {stopping}
            await asyncio.wait(others, timeout=options.shutdown_deadline_s, return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
        if watching.done():
            watching.result()
    finally:
        watching.cancel()
        registering.cancel()
        is_gone = any(end.done() for end in ends - {stopping})
        engine.fail("the engine process has ended" if is_gone else "the worker is shutting down")
        await runner.cleanup()


async def _leave_and_drain(
    app: WorkerApp, registration: Registration, registering: "asyncio.Task[None]", options: ServerOptions
) -> None:
    """End what is open; before, leave the router, in half of the time at most, so that no leg on its way here is refused."""
    registering.cancel()
    await asyncio.wait([registering])
    await registration.leave(options.shutdown_deadline_s / 2)
    await app.drain()
