"""One rank of a decode worker: `python -m decode_worker.engine_process FOLDER RANK flags...`, started by the frontend.

Two threads: the engine's loop in the main one, the transfer in its own.
"""

from functools import partial

from common.engine.build import EngineParts, build_engine, build_follower
from common.engine.loop import serve, serve_follower
from common.engine.mates import Mates
from common.engine.rank_process import run_rank
from common.ids import new_peer_id
from common.process import run_main
from common.wire import ControlDialer, EngineChannel, engine_endpoint
from decode_worker.config import DecodeConfig
from decode_worker.process import read_config
from decode_worker.worker import DecodeWorker
from transfer.commands import ReceiverMailbox
from transfer.config import read_secret
from transfer.endpoint import Mailbox, TransferCounts, TransferThread
from transfer.group import open_agent
from transfer.hand import Hand, open_hand
from transfer.messages import DecodeToPrefill, PrefillToDecode
from transfer.receiver import Receiver


def main(argv: list[str], parts: EngineParts = EngineParts()) -> None:
    """Load the rank's part of the model; then lead its attention group until the frontend says `Shutdown`, or follow."""
    run_rank(argv, "decode", read_config, lead=partial(_lead, parts), follow=partial(_follow, parts))


def _lead(parts: EngineParts, config: DecodeConfig, mates: Mates) -> None:
    secret = read_secret(config.transfer)
    channel = EngineChannel(engine_endpoint(mates.folder, mates.rank.group))
    engine = build_engine(config.model, config.engine, chunked_prefill_tokens=0, mates=mates, parts=parts)
    mailbox: ReceiverMailbox = Mailbox(channel.wake)
    counts = TransferCounts()

    def open_receiver() -> Receiver:
        peer_id = new_peer_id("decode")
        agent = open_agent(peer_id, engine.kv_pool.info(), mates.rank, mates.folder)
        link: ControlDialer[PrefillToDecode, DecodeToPrefill] = ControlDialer(peer_id, PrefillToDecode, secret=secret)
        return Receiver(agent, link, mailbox, config.transfer, peer_id=peer_id, counts=counts)

    worker = DecodeWorker(
        engine,
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
        TransferThread(open_receiver, channel.wake),
        overlap=config.engine.overlap,
        watchdog_s=config.engine.watchdog_s,
        shutdown_deadline_s=config.server.shutdown_deadline_s,
    )


def _follow(parts: EngineParts, config: DecodeConfig, mates: Mates) -> None:
    follower = build_follower(config.model, config.engine, chunked_prefill_tokens=0, mates=mates, parts=parts)

    def open_own_hand() -> Hand:
        return open_hand(new_peer_id("decode"), follower.forward.kv_pool.info(), mates.rank, mates.folder)

    thread = TransferThread(open_own_hand, mates.wake_follower)
    serve_follower(follower, thread, shutdown_deadline_s=config.server.shutdown_deadline_s)


if __name__ == "__main__":
    run_main(main)
