"""Sampling as a pure function of logits, parameters, seed and absolute position (R17).

A token is drawn by an exponential race: each candidate's probability is divided by exponential noise, and the largest
quotient wins, which draws from exactly those probabilities and needs no renormalising after top-k, top-p and min-p. The noise
of candidate v at position p is a hash of (seed, p, v), so a draw depends on nothing else: not on the batch, the step or the
worker. Integer hashing gives the same bits on a CPU and on a GPU.

Shape letters: S sampled positions, V vocabulary.
"""

from dataclasses import dataclass

import torch

from common.kernels.interface import Kernels
from common.kernels.reference import GREEDY_BELOW, logprobs_of, race


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The parameters of S draws; tensors `[S]` on the device, and what the host knows of them all."""

    temperatures_S: torch.Tensor
    top_ks_S: torch.Tensor
    """int64; V or more where top-k is off."""
    top_ps_S: torch.Tensor
    min_ps_S: torch.Tensor
    seeds_S: torch.Tensor
    positions_S: torch.Tensor
    """int64: absolute position of the token that is drawn."""
    all_greedy: bool
    any_filtered: bool


def sample(logits_SV: torch.Tensor, batch: SamplingBatch, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row: `(token ids int64 [S], logprobs float32 [S])`; logits are in any floating dtype.

    The logprob is the model's own, from the softmax of the unscaled logits, whatever temperature and filters were.
    """
    tokens_S, logprobs_S = kernels.draw(
        logits_SV, batch.temperatures_S, batch.seeds_S, batch.positions_S, all_greedy=batch.all_greedy
    )
    if not batch.any_filtered:
        return tokens_S, logprobs_S
    # Rows without filters keep their token: it must not depend on who is beside them.
    is_filtered_S = (batch.top_ks_S < logits_SV.shape[1]) | (batch.top_ps_S < 1) | (batch.min_ps_S > 0)
    is_filtered_S &= batch.temperatures_S >= GREEDY_BELOW
    safe_temperatures_S = torch.where(is_filtered_S, batch.temperatures_S, 1.0)
    probs_SV = _filter(torch.softmax(logits_SV.float() / safe_temperatures_S[:, None], dim=-1), batch)
    tokens_S = torch.where(is_filtered_S, race(probs_SV, batch.seeds_S, batch.positions_S), tokens_S)
    return tokens_S, logprobs_of(logits_SV, tokens_S)


def top_logprobs(logits_SV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens of each row, likeliest first: logprobs float32 and token ids int64, both `[S, count]`."""
    values_SK, ids_SK = torch.log_softmax(logits_SV, dim=-1, dtype=torch.float32).topk(count, dim=-1)
    return values_SK, ids_SK


def _filter(probs_SV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Zero what top-k, then top-p of what is left, then min-p exclude; the likeliest token always stays."""
    sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(probs_SV.shape[1], device=probs_SV.device)
    sorted_SV = torch.where(ranks_V < batch.top_ks_S[:, None], sorted_SV, 0.0)
    mass_before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    outside_top_p_SV = mass_before_SV >= batch.top_ps_S[:, None] * sorted_SV.sum(dim=-1, keepdim=True)
    # Rounded sums would take unlikely tokens from a row that has no top-p, but only beside a row that has filters.
    outside_top_p_SV &= batch.top_ps_S[:, None] < 1
    outside_min_p_SV = sorted_SV < batch.min_ps_S[:, None] * sorted_SV[:, :1]
    sorted_SV = sorted_SV.masked_fill((outside_top_p_SV | outside_min_p_SV) & (ranks_V > 0), 0.0)
    return torch.zeros_like(probs_SV).scatter_(1, order_SV, sorted_SV)
