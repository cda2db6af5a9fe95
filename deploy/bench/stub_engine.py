"""`python -m deploy.bench.stub_engine ENDPOINT NUM_ROWS`: an engine that computes nothing and answers at once, with rows.

Neighbours: `watched_frontend` (starts this), `common.wire` (the channel between the two).
"""

from typing import Final

from common.messages import EngineReady, Finished, FinishReason, Generate, RowBlock, Shutdown
from common.process import run_main
from common.wire import EngineChannel
from deploy.bench.material import SPEC, WEIGHT_VERSION, make_block

VOCABULARY: Final = 16

_MANY: Final = 2**20
_WAIT_S: Final = 0.1


def main(argv: list[str]) -> None:
    """Answer until the process is told to stop."""
    endpoint, num_rows = argv
    channel = EngineChannel(endpoint)
    block = make_block(0, int(num_rows))
    channel.send(_ready())
    while True:
        for message in channel.receive():
            match message:
                case Generate():
                    channel.send(_finished(message, block), block.data)
                case Shutdown():
                    channel.close()
                    return
                case _:
                    pass  # nothing is ever under way that could be ended, and nobody asks for more
        channel.wait(_WAIT_S)


def _ready() -> EngineReady:
    return EngineReady(
        model_type="qwen3_moe",
        dtype="float32",
        device="cpu",
        vocab_size=VOCABULARY,
        context_tokens=_MANY,
        kv_pool_tokens=_MANY,
        page_size=16,
        num_hidden_layers=SPEC.num_hidden_layers,
        moe_layer_ids=SPEC.layer_ids,
        num_experts=SPEC.num_experts,
        top_k=SPEC.top_k,
        max_running_requests=16,
        weight_version=WEIGHT_VERSION,
    )


def _finished(message: Generate, block: RowBlock) -> Finished:
    num_tokens = message.options.sampling.max_new_tokens
    return Finished(
        rid=message.rid,
        prompt_tokens=len(message.input_ids),
        cached_tokens=0,
        token_ids=[1] * num_tokens,
        logprobs=[0.0] * num_tokens,
        finish_reason=FinishReason(type="length", length=num_tokens),
        rows=block.header,
        weight_versions=block.header.weight_versions,
    )


if __name__ == "__main__":
    run_main(main)
