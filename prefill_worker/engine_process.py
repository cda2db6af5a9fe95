"""One rank of a prefill worker: `python -m prefill_worker.engine_process FOLDER RANK flags...`, started by the frontend.

Two threads: the engine's loop in the main one, the transfer in its own.
"""

from functools import partial

from common.engine.build import EngineParts, build_engine, build_follower
from common.engine.loop import serve, serve_follower
from common.engine.mates import Mates
from common.engine.rank_process import run_rank
from common.ids import new_peer_id
from common.messages import DecodeToPrefill, PrefillToDecode
from common.process import run_main
from common.wire import ControlListener, EngineChannel, engine_endpoint
from prefill_worker.config import PrefillConfig
from prefill_worker.process import read_config
from prefill_worker.worker import PrefillWorker
from transfer.config import read_secret
from transfer.endpoint import Mailbox, TransferThread
from transfer.group import open_agent
from transfer.hand import open_hand
from transfer.sender import Sender


def main(argv: list[str], parts: EngineParts = EngineParts()) -> None:
    """Load the rank's part of the model; then lead its attention group until the frontend says `Shutdown`, or follow."""
    run_rank(argv, "prefill", read_config, lead=partial(_lead, parts), follow=partial(_follow, parts))


def _lead(parts: EngineParts, config: PrefillConfig, mates: Mates) -> None:
    host, group = config.prefill.bootstrap_host, mates.rank.group
    link: ControlListener[DecodeToPrefill, PrefillToDecode] = ControlListener(
        host,
        config.prefill.bootstrap_port + group,
        DecodeToPrefill,
        secret=read_secret(config.transfer, listens_on=host),
    )
    channel = EngineChannel(engine_endpoint(mates.folder, group))
    engine = build_engine(
        config.model,
        config.engine,
        chunked_prefill_tokens=config.prefill.chunked_prefill_tokens,
        mates=mates,
        parts=parts,
    )
    peer_id = new_peer_id("prefill")
    sender = Sender(
        open_agent(peer_id, engine.kv_pool.info(), mates.rank, mates.folder),
        link,
        Mailbox(link.wake, channel.wake),
        config.transfer,
        peer_id=peer_id,
        weight_version=engine.weight_version,
        dp=mates.rank.of.dp,
    )
    worker = PrefillWorker(
        engine,
        config.prefill,
        sender.mailbox,
        sender,
        channel.send,
        verify_rows=config.engine.verify_rows,
        wake=channel.wake,
    )
    mates.wake(channel)
    serve(
        channel,
        engine,
        worker,
        TransferThread(sender, channel.wake),
        overlap=config.engine.overlap,
        watchdog_s=config.engine.watchdog_s,
        shutdown_deadline_s=config.server.shutdown_deadline_s,
    )


def _follow(parts: EngineParts, config: PrefillConfig, mates: Mates) -> None:
    follower = build_follower(
        config.model,
        config.engine,
        chunked_prefill_tokens=config.prefill.chunked_prefill_tokens,
        mates=mates,
        parts=parts,
    )
    hand = open_hand(new_peer_id("prefill"), follower.forward.kv_pool.info(), mates.rank, mates.folder)
    thread = TransferThread(hand, mates.wake_follower)
    serve_follower(follower, thread, shutdown_deadline_s=config.server.shutdown_deadline_s)


if __name__ == "__main__":
    run_main(main)
