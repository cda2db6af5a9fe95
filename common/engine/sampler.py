"""Sampling as a pure function of logits, parameters, seed and absolute position (R17).

A token is drawn by an exponential race: each candidate's probability is divided by exponential noise, and the largest
quotient wins, which draws from exactly those probabilities and needs no renormalising after top-k, top-p and min-p. The noise
of candidate v at position p is a hash of (seed, p, v), so a draw depends on nothing else: not on the batch, the step or the
worker. Integer hashing gives the same bits on a CPU and on a GPU.

Shape letters: S sampled positions, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.engine.device import Device, as_int64
from common.messages import SamplingParams

GREEDY_BELOW = 1e-6
"""Temperatures under this are greedy."""

_GOLDEN = -0x61C8864680B583EB  # 2**64 / the golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
_UNIFORM_BITS = 23  # with 24, the largest value would round to 1 in float32 and its noise to 0


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

    @classmethod
    def of(
        cls, params: list[SamplingParams], seeds: list[int], positions: list[int], device: Device
    ) -> "SamplingBatch":
        """Gather the parameters of one step's draws."""

        def floats(values: list[float]) -> torch.Tensor:
            return device.upload(np.asarray(values, dtype=np.float32))

        return cls(
            temperatures_S=floats([p.temperature for p in params]),
            top_ks_S=device.upload(as_int64([p.top_k if p.top_k > 0 else 2**31 for p in params])),
            top_ps_S=floats([p.top_p for p in params]),
            min_ps_S=floats([p.min_p for p in params]),
            seeds_S=device.upload(as_int64(seeds)),
            positions_S=device.upload(as_int64(positions)),
            all_greedy=all(p.temperature < GREEDY_BELOW for p in params),
            any_filtered=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params),
        )


def sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row: `(token ids int64 [S], logprobs float32 [S])`.

    The logprob is the model's own, from the softmax of the unscaled logits, whatever temperature and filters were.
    """
    greedy_S = logits_SV.argmax(dim=-1)
    if batch.all_greedy:
        tokens_S = greedy_S
    else:
        is_greedy_S = batch.temperatures_S < GREEDY_BELOW
        safe_temperatures_S = torch.where(is_greedy_S, 1.0, batch.temperatures_S)
        probs_SV = torch.softmax(logits_SV / safe_temperatures_S[:, None], dim=-1)
        if batch.any_filtered:
            probs_SV = _filter(probs_SV, batch)
        noise_SV = exponential_noise(batch.seeds_S, batch.positions_S, logits_SV.shape[1])
        tokens_S = torch.where(is_greedy_S, greedy_S, (probs_SV / noise_SV).argmax(dim=-1))
    return tokens_S, logprobs_of(logits_SV, tokens_S)


def logprobs_of(logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> torch.Tensor:
    """The logprobs float32 `[S]` of given tokens under the unscaled logits."""
    return torch.log_softmax(logits_SV, dim=-1).gather(1, tokens_S[:, None])[:, 0]


def top_logprobs(logits_SV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens of each row, likeliest first: logprobs float32 and token ids int64, both `[S, count]`."""
    values_SK, ids_SK = torch.log_softmax(logits_SV, dim=-1).topk(count, dim=-1)
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
