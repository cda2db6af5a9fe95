"""A worker's frontend process: the HTTP server, the tokenizer, and one engine process below it.

It starts the engine as a child and is the engine's only client. When the engine ends, whatever the reason, the open requests
fail, and so does this process: a worker without an engine is no worker. All kinds run this; what differs is in the arguments.
"""

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any, Final, Protocol

import uvloop
from msgspec import Struct
from msgspec.structs import replace

from common.config import EngineOptions, ModelOptions, ServerOptions, to_flags
from common.messages import WorkerKind, leg_of
from common.models.config import resolve_checkpoint
from common.observability.logging import configure_logging
from common.process import EXIT_USAGE, ensure_port_free, spawn_async
from common.server.app import WorkerApp
from common.server.engine_client import EngineClient
from common.server.http import start_server, stop_on_signals
from common.server.tokenizer import Tokenizer
from common.wire import FrontendChannel

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
        """When the engine counts as stuck."""

    @property
    def server(self) -> ServerOptions:
        """Where to listen."""


def run_frontend(
    kind: WorkerKind, config: WorkerConfig, *, engine_module: str, bootstrap_port: int | None = None
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. The engine is `python -m engine_module ENDPOINT flags...`.

    Raises UsageError for what the operator can mend.
    """
    configure_logging(kind, config.server.log_level)
    ensure_port_free(config.server.host, config.server.port)
    tokenizer = Tokenizer.load(resolve_checkpoint(config.model.model, weights=False))
    return uvloop.run(_serve(kind, config, tokenizer, engine_module, bootstrap_port))


async def _serve(
    kind: WorkerKind, config: WorkerConfig, tokenizer: Tokenizer, engine_module: str, bootstrap_port: int | None
) -> int:
    stop = stop_on_signals()
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        endpoint = f"ipc://{Path(folder) / 'engine'}"
        channel = FrontendChannel(endpoint)
        engine = EngineClient(channel, config.engine, leg=leg_of(kind))
        assert isinstance(config, Struct)
        # Anybody on this host can read a process's flags, and the engine has no use for the key.
        flags = to_flags(replace(config, server=replace(config.server, api_key="")))
        process = await spawn_async(engine_module, [endpoint, *flags])
        receiving = asyncio.create_task(engine.run())
        exited = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(stop.wait())
        ends: set[asyncio.Task[Any]] = {exited, stopping, receiving}
        try:
            await asyncio.wait({engine.ready, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if engine.ready.done():
                app = WorkerApp(
                    kind,
                    engine,
                    engine.ready.result(),
                    tokenizer,
                    config.model,
                    config.server,
                    config.engine,
                    bootstrap_port=bootstrap_port,
                )
                await _run_until_end(app, config.server, engine, ends, stopping)
            if receiving.done():
                receiving.result()
            if stopping.done():
                engine.shut_down()
                return 0
            code = await exited
            if code == EXIT_USAGE:
                return EXIT_USAGE  # the engine has said what was wrong, in one line
            log.error("the engine process has ended with exit code %d", code)
            return 1
        finally:
            await _end_engine(process, exited, config.server.shutdown_deadline_s)
            for task in (receiving, stopping):
                task.cancel()
            channel.close()


async def _run_until_end(
    app: WorkerApp,
    options: ServerOptions,
    engine: EngineClient,
    ends: "set[asyncio.Task[Any]]",
    stopping: "asyncio.Task[Any]",
) -> None:
    """Serve until one of `ends`. If it is `stopping`, what is open may end within the shutdown deadline; else it fails at once.

    Either way whoever waits gets an answer before the connections are closed.
    """
    runner = await start_server(app.application(), options, shutdown_deadline_s=_LAST_WORDS_S)
    watching = asyncio.create_task(engine.watch())
    try:
        await asyncio.wait({watching, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            drained = asyncio.create_task(app.drain())
            others = {drained, watching, *ends} - {stopping}
            await asyncio.wait(others, timeout=options.shutdown_deadline_s, return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
        if watching.done():
            watching.result()
    finally:
        watching.cancel()
        is_gone = any(end.done() for end in ends - {stopping})
        engine.fail("the engine process has ended" if is_gone else "the worker is shutting down")
        await runner.cleanup()


async def _end_engine(process: asyncio.subprocess.Process, exited: "asyncio.Task[int]", deadline_s: float) -> None:
    """Wait for the engine to obey `Shutdown`, or kill it."""
    if process.returncode is None:
        done, _ = await asyncio.wait({exited}, timeout=deadline_s)
        if not done:
            process.kill()
            await exited
