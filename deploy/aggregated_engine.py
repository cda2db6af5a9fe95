"""One rank of an aggregated worker: `python -m deploy.aggregated_engine FOLDER RANK flags...`, started by the frontend.

One thread beside that of the rows: there is no transfer.
"""

from functools import partial

from common.engine.build import EngineParts, build_engine, build_follower
from common.engine.loop import serve, serve_follower
from common.engine.mates import Mates
from common.engine.rank_process import run_rank
from common.process import run_main
from common.wire import EngineChannel, engine_endpoint
from deploy.aggregated import AggregatedWorker, NoTransfer
from deploy.aggregated_config import AggregatedConfig, read_config


def main(argv: list[str], parts: EngineParts = EngineParts()) -> None:
    """Load the rank's part of the model; then lead its attention group until the frontend says `Shutdown`, or follow."""
    run_rank(argv, "aggregated", read_config, lead=partial(_lead, parts), follow=partial(_follow, parts))


def _lead(parts: EngineParts, config: AggregatedConfig, mates: Mates) -> None:
    channel = EngineChannel(engine_endpoint(mates.folder, mates.rank.group))
    options = config.aggregated
    engine = build_engine(
        config.model, config.engine, chunked_prefill_tokens=options.chunked_prefill_tokens, mates=mates, parts=parts
    )
    worker = AggregatedWorker(
        engine,
        chunked_prefill_tokens=options.chunked_prefill_tokens,
        prefix_cache=options.prefix_cache,
        reply=channel.send,
        verify_rows=config.engine.verify_rows,
        wake=channel.wake,
    )
    mates.wake(channel)
    serve(
        channel,
        engine,
        worker,
        NoTransfer(),
        overlap=config.engine.overlap,
        watchdog_s=config.engine.watchdog_s,
        shutdown_deadline_s=config.server.shutdown_deadline_s,
    )


def _follow(parts: EngineParts, config: AggregatedConfig, mates: Mates) -> None:
    follower = build_follower(
        config.model,
        config.engine,
        chunked_prefill_tokens=config.aggregated.chunked_prefill_tokens,
        mates=mates,
        parts=parts,
    )
    serve_follower(follower, NoTransfer(), shutdown_deadline_s=config.server.shutdown_deadline_s)


if __name__ == "__main__":
    run_main(main)
