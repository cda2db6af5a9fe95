"""Judges answers against transformers: rows as sets, greedy tokens, and the one excuse there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.reference import TIE_LOGITS, Reference, Trace, compare


@dataclass
class Tally:
    """What a run came to, over all its requests."""

    requests: int = 0
    rows: int = 0
    wrong: int = 0
    """Requests with a wrong row or token that no tie excuses."""
    ties: int = 0
    """Requests whose first difference is a tie."""

    def assert_clean(self) -> None:
        """Nothing wrong, and at most 1 % of the requests excused."""
        assert self.requests > 0
        assert self.rows > 0
        assert self.wrong == 0
        assert self.ties <= self.requests / 100


class Judge:
    """transformers' own model of one checkpoint; traces are kept, since many configurations yield the same sequences."""

    def __init__(self, checkpoint: Path) -> None:
        self.reference = Reference(checkpoint)
        self._traces: dict[tuple[int, ...], Trace] = {}

    def trace(self, token_ids: Sequence[int]) -> Trace:
        """What transformers computes over these tokens."""
        key = tuple(token_ids)
        if key not in self._traces:
            self._traces[key] = self.reference.trace(key)
        return self._traces[key]

    def add(
        self,
        tally: Tally,
        prompt: Sequence[int],
        output_ids: Sequence[int],
        rows: np.ndarray,
        *,
        start: int = 0,
        greedy: bool = True,
    ) -> None:
        """Count one answer with rows `[P+G-1-start, L, K]`."""
        trace = self.trace([*prompt, *output_ids[:-1]])
        assert rows.shape[0] == max(0, len(prompt) + len(output_ids) - 1 - start)
        comparison = compare(trace, rows, start)
        tally.requests += 1
        tally.rows += comparison.num_rows
        wrong, excused = comparison.differing_rows > 0, comparison.is_tie
        if greedy and not wrong:
            wrong, excused = self._tokens_differ(trace, len(prompt), output_ids)
        tally.ties += wrong and excused
        tally.wrong += wrong and not excused

    def _tokens_differ(self, trace: Trace, num_prompt_tokens: int, output_ids: Sequence[int]) -> tuple[bool, bool]:
        for logits, token_id in zip(trace.logits[num_prompt_tokens - 1 :], output_ids, strict=True):
            if int(logits.argmax()) != token_id:
                return True, float(logits.max() - logits[token_id]) <= TIE_LOGITS
        return False, False
