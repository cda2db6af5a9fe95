"""A rank that computes nothing: `python -m tests.support.stub_ranks FOLDER RANK FLAGS...`, those of an aggregated worker.

A leader reports one token of each request, and never ends it; a follower waits for its leader to tell it to end. With
`--weight-version refuse-N` rank N refuses its options. Neighbour: `stub_ranks_worker`, which starts these.
"""

from common.errors import UsageError
from common.messages import Beat, EngineReady, Generate, Shutdown, Tokens
from common.process import run_main
from common.ranks import Rank
from common.wire import EngineChannel, RankLink, engine_endpoint
from deploy.aggregated_config import read_config

READY = EngineReady(
    model_type="qwen3_moe",
    dtype="float32",
    device="cpu",
    vocab_size=100,
    context_tokens=1000,
    kv_pool_tokens=1000,
    page_size=4,
    num_hidden_layers=2,
    moe_layer_ids=(1,),
    num_experts=4,
    top_k=2,
    max_running_requests=4,
    weight_version="stub",
)
BEAT_S = 0.2


def main(argv: list[str]) -> None:
    """Serve the frontend until told to end."""
    folder, index, *flags = argv
    config = read_config(flags)
    rank = config.engine.ranks.rank(int(index))
    if config.model.weight_version == f"refuse-{index}":
        raise UsageError(f"rank {index} cannot use this")
    link: RankLink[Shutdown, Shutdown] = RankLink(folder, "stub", rank.index, Shutdown)
    if rank.is_leader:
        _lead(rank, link, EngineChannel(engine_endpoint(folder, rank.group)))
    else:
        while not link.receive():
            link.wait(60.0)
    link.close()


def _lead(rank: Rank, link: RankLink[Shutdown, Shutdown], channel: EngineChannel) -> None:
    channel.send(READY)
    while True:
        for message in channel.receive():
            match message:
                case Generate():
                    channel.send(Tokens(message.rid, [rank.group], [0.0]))
                case Shutdown():
                    for follower in rank.followers:
                        link.send(follower, message)
                    channel.close()
                    return
                case _:
                    pass  # nobody here asks for anything else
        channel.send(Beat(0, 0, 1))
        channel.wait(BEAT_S)


if __name__ == "__main__":
    run_main(main)
