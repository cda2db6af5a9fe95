"""Drawing tokens in Triton: the exponential race of `common.engine.sampler` over the whole vocabulary, in two launches.

Each candidate's scaled logit minus the logarithm of its exponential noise races in log space, which orders the candidates as
probability / noise does. The noise is the same hash, bit for bit; a draw can differ from the torch twin's only where two
candidates are closer than rounding. No filters and no penalties here: those rows take the torch path.

Shape letters: S sampled positions, V vocabulary.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # of the vocabulary; the same for every S, so that sums do not depend on the batch


def draw(
    logits_SV: torch.Tensor, temperatures_S: torch.Tensor, seeds_S: torch.Tensor, positions_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row: `(token ids int64 [S], logprobs float32 [S])`; temperatures under 1e-6 are greedy.

    Logits are in any floating dtype; the logprob is the one of the unscaled logits. Seeds and positions are int64.
    """
    num_rows, vocab_size = logits_SV.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    device = logits_SV.device
    partial_4SB = torch.empty((4, num_rows, num_blocks), dtype=torch.float32, device=device)
    candidates_SB = torch.empty((num_rows, num_blocks), dtype=torch.int32, device=device)
    tokens_S = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs_S = torch.empty(num_rows, dtype=torch.float32, device=device)
    _race[(num_rows, num_blocks)](
        logits_SV,
        temperatures_S,
        seeds_S,
        positions_S,
        partial_4SB,
        candidates_SB,
        logits_SV.stride(0),
        V=vocab_size,
        NUM_BLOCKS=num_blocks,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    _finish[(num_rows,)](
        partial_4SB,
        candidates_SB,
        tokens_S,
        logprobs_S,
        NUM_BLOCKS=num_blocks,
        PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=1,
    )
    return tokens_S, logprobs_S


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize_on_alignment=["temperatures", "seeds", "positions"])
def _race(
    logits,
    temperatures,
    seeds,
    positions,
    partial,
    candidates,
    row_stride,
    V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row.to(tl.int64) * row_stride + tokens, mask=tokens < V, other=-float("inf")).to(
        tl.float32
    )
    temperature = tl.load(temperatures + row)
    score = logit
    if temperature >= 1e-6:
        seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
        position = tl.load(positions + row).to(tl.uint64, bitcast=True)
        stream = _mix(seed + _mix(position * 0x9E3779B97F4A7C15))
        bits = _mix(stream + (tokens + 1).to(tl.uint64) * 0x9E3779B97F4A7C15) >> 41
        uniform = (bits.to(tl.uint32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        score = logit / temperature - tl.log(-tl.log(uniform))
    best, place = tl.max(score, 0, return_indices=True)
    highest = tl.max(logit, 0)
    total = tl.sum(tl.exp(logit - highest), 0)
    won = tl.sum(tl.where(tokens == block * BLOCK + place, logit, 0.0), 0)
    size = tl.num_programs(0) * NUM_BLOCKS
    target = row * NUM_BLOCKS + block
    tl.store(partial + target, best)
    tl.store(partial + size + target, highest)
    tl.store(partial + 2 * size + target, total)
    tl.store(partial + 3 * size + target, won)
    tl.store(candidates + target, block * BLOCK + place)


@triton.jit
def _finish(partial, candidates, tokens, logprobs, NUM_BLOCKS: tl.constexpr, PADDED_BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    blocks = tl.arange(0, PADDED_BLOCKS)
    is_block = blocks < NUM_BLOCKS
    size = tl.num_programs(0) * NUM_BLOCKS
    source = row * NUM_BLOCKS + blocks
    score = tl.load(partial + source, mask=is_block, other=-float("inf"))
    highest = tl.load(partial + size + source, mask=is_block, other=-float("inf"))
    total = tl.load(partial + 2 * size + source, mask=is_block, other=0.0)
    _, winner = tl.max(score, 0, return_indices=True)
    top = tl.max(highest, 0)
    log_total = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    won = tl.load(partial + 3 * size + row * NUM_BLOCKS + winner)
    tl.store(tokens + row, tl.load(candidates + row * NUM_BLOCKS + winner).to(tl.int64))
    tl.store(logprobs + row, won - log_total)
