"""`python -m deploy.bench.watched_frontend PORT NUM_ROWS`: a decode worker's frontend with a heartbeat in its event loop.

Its engine is `stub_engine`, a process of its own as a real one is, which ends every request at once with `NUM_ROWS` rows.
"""

import asyncio
import tempfile

import tokenizers
import uvloop
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from common.config import EngineOptions, ModelOptions, ServerOptions
from common.observability.logging import configure_logging
from common.process import run_main, spawn_async, stop_process_async
from common.ranks import Ranks
from common.server.app import WorkerApp
from common.server.engine_client import EngineClient
from common.server.engine_groups import EngineGroups
from common.server.tokenizer import Tokenizer
from common.wire import FrontendChannel, engine_endpoint
from deploy.bench.heartbeat import serve_watched
from deploy.bench.stub_engine import VOCABULARY

_STOP_DEADLINE_S = 5.0


def main(argv: list[str]) -> None:
    """Serve until the process is told to stop."""
    configure_logging("decode", "warning")
    port, num_rows = map(int, argv)
    uvloop.run(_serve(port, num_rows))


async def _serve(port: int, num_rows: int) -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        endpoint = engine_endpoint(folder, 0)
        channel = FrontendChannel(endpoint)
        engine = EngineGroups([EngineClient(channel, EngineOptions(), leg="decode")], Ranks(), leg="decode")
        process = await spawn_async("deploy.bench.stub_engine", [endpoint, str(num_rows)])
        receiving = asyncio.create_task(engine.run())
        try:
            app = WorkerApp(
                "decode",
                engine,
                await engine.ready(),
                _tokenizer(),
                ModelOptions(model="bench"),
                ServerOptions(),
                EngineOptions(),
                bootstrap_port=None,
            )
            await serve_watched(app.application(), port)
        finally:
            receiving.cancel()
            await stop_process_async(process, _STOP_DEADLINE_S)
            channel.close()


def _tokenizer() -> Tokenizer:
    """Make a tokenizer of one-letter words."""
    words = {chr(ord("a") + number): number for number in range(VOCABULARY)}
    backend = tokenizers.Tokenizer(WordLevel(words, unk_token="a"))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a"))


if __name__ == "__main__":
    run_main(main)
