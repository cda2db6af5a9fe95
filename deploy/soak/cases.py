"""The fixed set of prompts, with the tokens and rows that transformers' own model gives each: the oracle of a soak.

All are greedy and of a fixed length, so that each has one right answer. A case in which float32 rounding could decide is
not taken; so an answer is compared bit for bit, in which order a row names its experts included.

Shape letters: P, G tokens of prompt and output, M MoE layers, K top-k. Neighbours: `client` (sends them), `judge`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from common.errors import UsageError
from deploy.answers import Ids
from deploy.replay.reference import TIE_LOGITS, Reference, Trace

MAX_PROMPT_TOKENS = 120
MAX_NEW_TOKENS = 40
CLEAR_LOGITS = 2 * TIE_LOGITS
"""Two candidates whose logits are closer than this might be swapped by another order of additions."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and its one right answer."""

    prompt: list[int]
    output_ids: list[int]
    rows: Ids
    """`[P+G-1, M, K]`, likeliest first."""


class _ModelConfig(Struct):
    """The part of config.json that is read here."""

    vocab_size: int


def draw_cases(folder: Path, seed: int, count: int) -> list[Case]:
    """Draw prompts and run the reference over each. Raises UsageError for a checkpoint that cannot be used."""
    try:
        vocab_size = msgspec.json.decode((folder / "config.json").read_bytes(), type=_ModelConfig).vocab_size
        reference = Reference(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {folder}: {error}") from error
    return list(islice(_clear_cases(reference, vocab_size, random.Random(seed)), count))


def _clear_cases(reference: Reference, vocab_size: int, rng: random.Random) -> Iterator[Case]:
    while True:
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, MAX_PROMPT_TOKENS))]
        output_ids = reference.generate(prompt, rng.randint(1, MAX_NEW_TOKENS))
        trace = reference.trace([*prompt, *output_ids[:-1]])
        if is_clear(trace, len(prompt)):
            yield Case(prompt, output_ids, trace.expert_ids)


def is_clear(trace: Trace, num_prompt_tokens: int) -> bool:
    """Whether no choice of a token, of an expert or of the experts' order is close."""
    top_k = trace.expert_ids.shape[-1]
    experts = _gaps(trace.router_logits)[..., :top_k]
    tokens = _gaps(trace.logits[num_prompt_tokens - 1 :])[..., :1]
    return bool(min(experts.min(initial=np.inf), tokens.min(initial=np.inf)) > CLEAR_LOGITS)


def _gaps(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How far each candidate is ahead of the next one, best first."""
    gaps: npt.NDArray[np.float32] = -np.diff(-np.sort(-logits, axis=-1), axis=-1)
    return gaps
