"""One rank of a prefill worker: `python -m prefill_worker.engine_process FOLDER RANK flags...`, started by the frontend.

Two threads: the engine's loop in the main one, the transfer in its own.
"""

from functools import partial

from common.engine.build import EngineParts, build_engine, build_follower
from common.engine.loop import serve, serve_follower
from common.engine.mates import Mates
from common.engine.rank_process import run_rank
from common.ids import new_peer_id
from common.process import run_main
from common.wire import ControlListener, EngineChannel, engine_endpoint
from prefill_worker.config import PrefillConfig
from prefill_worker.process import read_config
from prefill_worker.worker import PrefillWorker
from transfer.commands import SenderMailbox
from transfer.config import read_secret
from transfer.endpoint import Mailbox, TransferCounts, TransferThread
from transfer.group import open_agent
from transfer.hand import Hand, open_hand
from transfer.messages import DecodeToPrefill, PrefillToDecode
from transfer.sender import Sender


def main(argv: list[str], parts: EngineParts = EngineParts()) -> None:
    """Load the rank's part of the model; then lead its attention group until the frontend says `Shutdown`, or follow."""
    run_rank(argv, "prefill", read_config, lead=partial(_lead, parts), follow=partial(_follow, parts))


def _lead(parts: EngineParts, config: PrefillConfig, mates: Mates) -> None:
    host, port = config.prefill.bootstrap_host, config.prefill.bootstrap_port + mates.rank.group
    secret = read_secret(config.transfer, listens_on=host)

    def listen() -> ControlListener[DecodeToPrefill, PrefillToDecode]:
        return ControlListener(host, port, DecodeToPrefill, secret=secret)

    listen().close()  # an address that cannot be had is said before the model is loaded
    channel = EngineChannel(engine_endpoint(mates.folder, mates.rank.group))
    engine = build_engine(
        config.model,
        config.engine,
        chunked_prefill_tokens=config.prefill.chunked_prefill_tokens,
        mates=mates,
        parts=parts,
    )
    mailbox: SenderMailbox = Mailbox(channel.wake)
    counts = TransferCounts()

    def open_sender() -> Sender:
        peer_id, link = new_peer_id("prefill"), listen()
        return Sender(
            open_agent(peer_id, engine.kv_pool.info(), mates.rank, mates.folder),
            link,
            mailbox,
            config.transfer,
            peer_id=peer_id,
            dp=mates.rank.of.dp,
            counts=counts,
        )

    worker = PrefillWorker(
        engine,
        config.prefill,
        mailbox,
        counts,
        channel.send,
        verify_rows=config.engine.verify_rows,
        wake=channel.wake,
    )
    mates.wake(channel)
    serve(
        channel,
        engine,
        worker,
        TransferThread(open_sender, channel.wake),
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

    def open_own_hand() -> Hand:
        return open_hand(new_peer_id("prefill"), follower.forward.kv_pool.info(), mates.rank, mates.folder)

    thread = TransferThread(open_own_hand, mates.wake_follower)
    serve_follower(follower, thread, shutdown_deadline_s=config.server.shutdown_deadline_s)


if __name__ == "__main__":
    run_main(main)
