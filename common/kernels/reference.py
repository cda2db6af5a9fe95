"""Pure torch kernels: what an engine on a CPU runs, and the oracles that the GPU kernels are tested against.

They compute what transformers' Qwen3-MoE computes, rounding included, on any device. They know no model and no request;
the plan that `paged_attention` follows is described in `common.kernels.attention`.

Shape letters: T tokens, D hidden size, H query heads, h key/value heads, d head size, E experts, K top-k, I expert
width, Q queries and C context of one request, S sampled positions, V vocabulary. Caches are one layer's strided views
`[page, h, slot in page, d]` (`common.memory.kv_pool.KvPool.layer`); the slot of a token is `page * page_size + slot in page`.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from common.kernels.attention import AttentionPlan
from common.kernels.interface import ExpertMatrices


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale the last dimension to root mean square 1, then by `weight`; same shape and dtype as `x`.

    The mean is taken in float32 and the result rounded before the weight is applied, as transformers does.
    """
    x_float32 = x.float()
    normed = x_float32 * torch.rsqrt(x_float32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotary(
    q_THd: torch.Tensor, k_Thd: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries `[T, H, d]` and keys `[T, h, d]` by their positions; returns new tensors.

    Element i pairs with element i + d/2, and `cos`, `sin` repeat each angle in both halves (transformers' convention).
    """
    cos_T1d, sin_T1d = cos_Td.unsqueeze(1), sin_Td.unsqueeze(1)
    return _rotate(q_THd, cos_T1d, sin_T1d), _rotate(k_Thd, cos_T1d, sin_T1d)


def _rotate(x_THd: torch.Tensor, cos_T1d: torch.Tensor, sin_T1d: torch.Tensor) -> torch.Tensor:
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos_T1d + torch.cat((-second, first), dim=-1) * sin_T1d


def store_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots_T: torch.Tensor, k_Thd: torch.Tensor, v_Thd: torch.Tensor
) -> None:
    """Write each token's key and value `[T, h, d]` into its slot of the caches; `slots_T` is int64, without repeats."""
    page_size = k_cache.shape[2]
    page_T, slot_in_page_T = slots_T // page_size, slots_T % page_size
    k_cache[page_T, :, slot_in_page_T] = k_Thd
    v_cache[page_T, :, slot_in_page_T] = v_Thd


def paged_attention(
    q_THd: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, pages: torch.Tensor
) -> torch.Tensor:
    """Attend each query to its own request's keys up to its own position; returns `[T, H, d]`.

    `pages` are the plan's (int32 or int64), on the caches' device. The step's keys and values are in the cache already
    (`store_kv` ran first). H is a multiple of h; scores are scaled by 1/sqrt(d). Requests go one by one in decode steps
    too: one padded batch was 2 to 5 times slower on a CPU.
    """
    out_THd = torch.empty_like(q_THd)
    query_starts, page_starts = plan.query_starts.tolist(), plan.page_starts.tolist()
    for i, context_tokens in enumerate(plan.context_tokens.tolist()):
        queries = slice(query_starts[i], query_starts[i + 1])
        own_pages = pages[page_starts[i] : page_starts[i + 1]]
        out_THd[queries] = _attend_one(
            q_THd[queries], _gather(k_cache, own_pages, context_tokens), _gather(v_cache, own_pages, context_tokens)
        )
    return out_THd


def _gather(cache: torch.Tensor, pages: torch.Tensor, context_tokens: int) -> torch.Tensor:
    """Copy one request's pages into `[h, context, d]`."""
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :context_tokens]


def _attend_one(q_QHd: torch.Tensor, k_hCd: torch.Tensor, v_hCd: torch.Tensor) -> torch.Tensor:
    """Attention of a request's last Q positions over its C keys; returns `[Q, H, d]`."""
    num_queries, context_tokens = q_QHd.shape[0], k_hCd.shape[1]
    q_1HQd = q_QHd.transpose(0, 1).unsqueeze(0)
    if num_queries == 1:
        out_1HQd = F.scaled_dot_product_attention(q_1HQd, k_hCd.unsqueeze(0), v_hCd.unsqueeze(0), enable_gqa=True)
    else:
        # With heads repeated, torch has kernels on a GPU that never hold the scores of all queries at once.
        group = q_QHd.shape[1] // k_hCd.shape[0]
        out_1HQd = F.scaled_dot_product_attention(
            q_1HQd,
            k_hCd.repeat_interleave(group, dim=0).unsqueeze(0),
            v_hCd.repeat_interleave(group, dim=0).unsqueeze(0),
            # torch's own causal mask is aligned to the top left; the queries of a later chunk are the last rows.
            attn_mask=_lower_right_mask(num_queries, context_tokens, q_QHd.device),
        )
    return out_1HQd.squeeze(0).transpose(0, 1)


def _lower_right_mask(num_queries: int, context_tokens: int, device: torch.device) -> Any:
    """Let the last query see all keys, the one before all but the last one, and so on."""
    if device.type == "cpu":
        seen: torch.Tensor = torch.ones(num_queries, context_tokens, dtype=torch.bool)
        return seen.tril(context_tokens - num_queries)
    # On a GPU this is no tensor, but a choice of kernel. Imported only there: it brings torch's compiler, a second and more.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_queries, context_tokens)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[..., 2I]` whose last dimension is gate then up; returns `[..., I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(
    hidden_TD: torch.Tensor, gate_weight_ED: torch.Tensor, top_k: int, norm_topk_prob: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts: weights `[T, K]` in the hidden dtype and ids `[T, K]` int64, likeliest first.

    Softmax and top-k run in float32. Two experts of equal probability are ordered as torch.topk orders them.
    """
    probabilities_TE = F.linear(hidden_TD, gate_weight_ED).softmax(dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = probabilities_TE.topk(top_k, dim=-1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK.to(hidden_TD.dtype), ids_TK


def moe_experts(
    hidden_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2ID: ExpertMatrices,
    down_EDI: ExpertMatrices,
    *,
    first_expert: int = 0,
) -> torch.Tensor:
    """Run each token through its experts and add their outputs by weight; returns `[T, D]`.

    The weights are those of the experts `[first_expert, first_expert + E)`; a token's other experts, and whatever their weights
    are, add nothing. `ids_TK` is signed. An expert that some token chose runs once, over its tokens together; the only wait for
    the device is for the counts. A token's outputs are added in the order of `ids_TK`, so the order does not depend on the step's
    other tokens.
    """
    num_tokens, top_k = ids_TK.shape
    stop_expert = first_expert + len(gate_up_E2ID.weight)
    sorted_ids, order = ids_TK.flatten().sort(stable=True)
    experts = torch.arange(first_expert, stop_expert + 1, device=ids_TK.device, dtype=sorted_ids.dtype)
    starts = torch.searchsorted(sorted_ids, experts).tolist()
    here = order[starts[0] : starts[-1]]
    sorted_hidden = hidden_TD[here // top_k]
    sorted_out = torch.empty_like(sorted_hidden)
    for expert, (start, stop) in enumerate(pairwise(start - starts[0] for start in starts)):
        if start < stop:
            inner = silu_and_mul(F.linear(sorted_hidden[start:stop], gate_up_E2ID.of(expert, hidden_TD.dtype)))
            sorted_out[start:stop] = F.linear(inner, down_EDI.of(expert, hidden_TD.dtype))
    out_TKD = hidden_TD.new_zeros((num_tokens, top_k, hidden_TD.shape[1]))
    out_TKD.flatten(0, 1)[here] = sorted_out
    is_here_TK = (ids_TK >= first_expert) & (ids_TK < stop_expert)
    weights_TK = weights_TK.masked_fill(~is_here_TK, 0.0)
    return (out_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)


# ------------------------------------------------------------------------------------------------ drawing tokens

GREEDY_BELOW = 1e-6
"""Temperatures under this are greedy."""

_GOLDEN = -0x61C8864680B583EB  # 2**64 / the golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
_UNIFORM_BITS = 23  # with 24, the largest value would round to 1 in float32 and its noise to 0


def draw(
    logits_SV: torch.Tensor, temperatures_S: torch.Tensor, seeds_S: torch.Tensor, positions_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row: `(token ids int64 [S], logprobs float32 [S])`; the logprob is the one of the unscaled logits."""
    logits_SV = logits_SV.float()
    greedy_S = logits_SV.argmax(dim=-1)
    is_greedy_S = temperatures_S < GREEDY_BELOW
    probs_SV = torch.softmax(logits_SV / torch.where(is_greedy_S, 1.0, temperatures_S)[:, None], dim=-1)
    tokens_S = torch.where(is_greedy_S, greedy_S, race(probs_SV, seeds_S, positions_S))
    return tokens_S, logprobs_of(logits_SV, tokens_S)


def race(probs_SV: torch.Tensor, seeds_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """Draw from (unnormalised) probabilities float32 by an exponential race: the largest quotient probability / noise wins."""
    return (probs_SV / exponential_noise(seeds_S, positions_S, probs_SV.shape[1])).argmax(dim=-1)


def logprobs_of(logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> torch.Tensor:
    """The logprobs float32 `[S]` of given tokens under the unscaled logits."""
    return torch.log_softmax(logits_SV, dim=-1, dtype=torch.float32).gather(1, tokens_S[:, None])[:, 0]


def exponential_noise(seeds_S: torch.Tensor, positions_S: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exponential noise float32 `[S, V]`, every value a hash of (seed, position, token id) and greater than 0."""
    streams_S = _mix(seeds_S + _mix(positions_S * _GOLDEN))
    counters_V = torch.arange(1, vocab_size + 1, device=seeds_S.device) * _GOLDEN
    bits_SV = _shift_right(_mix(streams_S[:, None] + counters_V), 64 - _UNIFORM_BITS)
    uniform_SV = (bits_SV.to(torch.float32) + 0.5) * 2.0**-_UNIFORM_BITS
    return -torch.log(uniform_SV)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
