"""The decode worker's engine process: `python -m decode_worker.engine_process ENDPOINT flags...`, started by the frontend.

Two threads: the engine's loop in the main one, the transfer in its own.
"""

from common.engine.engine import EngineParts, build_engine
from common.engine.loop import serve
from common.ids import new_peer_id
from common.messages import DecodeToPrefill, PrefillToDecode
from common.observability.logging import configure_logging
from common.process import run_main
from common.wire import ControlDialer, EngineChannel
from decode_worker.process import read_config
from decode_worker.worker import DecodeWorker
from transfer.agent import NixlAgent
from transfer.config import read_secret
from transfer.endpoint import Mailbox, TransferThread
from transfer.receiver import Receiver


def main(argv: list[str], parts: EngineParts = EngineParts()) -> None:
    """Load the model, then serve the frontend until it says `Shutdown`."""
    endpoint, *flags = argv
    config = read_config(flags)
    configure_logging("decode/engine", config.server.log_level)
    channel = EngineChannel(endpoint)
    engine = build_engine(config.model, config.engine, chunked_prefill_tokens=0, parts=parts)
    peer_id, pool = new_peer_id("decode"), engine.kv_pool.info()
    link: ControlDialer[PrefillToDecode, DecodeToPrefill] = ControlDialer(
        peer_id, PrefillToDecode, secret=read_secret(config.transfer)
    )
    receiver = Receiver(
        NixlAgent(peer_id, pool),
        link,
        Mailbox(link.wake, channel.wake),
        pool,
        config.transfer,
        peer_id=peer_id,
        weight_version=engine.weight_version,
    )
    worker = DecodeWorker(
        engine,
        receiver.mailbox,
        receiver,
        channel.send,
        verify_rows=config.engine.verify_rows,
        wake=channel.wake,
    )
    serve(
        channel,
        engine,
        worker,
        TransferThread(receiver, channel.wake),
        overlap=config.engine.overlap,
        watchdog_s=config.engine.watchdog_s,
        shutdown_deadline_s=config.server.shutdown_deadline_s,
    )


if __name__ == "__main__":
    run_main(main)
