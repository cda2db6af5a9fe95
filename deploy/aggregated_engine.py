"""The aggregated worker's engine process: `python -m deploy.aggregated_engine ENDPOINT flags...`, started by the frontend.

One thread beside that of the rows: there is no transfer.
"""

from common.engine.engine import EngineParts, build_engine
from common.engine.loop import serve
from common.observability.logging import configure_logging
from common.process import run_main
from common.wire import EngineChannel
from deploy.aggregated import AggregatedWorker, NoTransfer
from deploy.aggregated_config import read_config


def main(argv: list[str], parts: EngineParts = EngineParts()) -> None:
    """Load the model, then serve the frontend until it says `Shutdown`."""
    endpoint, *flags = argv
    config = read_config(flags)
    configure_logging("aggregated/engine", config.server.log_level)
    channel = EngineChannel(endpoint)
    options = config.aggregated
    engine = build_engine(
        config.model, config.engine, chunked_prefill_tokens=options.chunked_prefill_tokens, parts=parts
    )
    worker = AggregatedWorker(
        engine,
        chunked_prefill_tokens=options.chunked_prefill_tokens,
        prefix_cache=options.prefix_cache,
        reply=channel.send,
        verify_rows=config.engine.verify_rows,
        wake=channel.wake,
    )
    serve(
        channel,
        engine,
        worker,
        NoTransfer(),
        overlap=config.engine.overlap,
        watchdog_s=config.engine.watchdog_s,
        shutdown_deadline_s=config.server.shutdown_deadline_s,
    )


if __name__ == "__main__":
    run_main(main)
