"""Judges answers whose weights changed on the way: transformers' model of each version, over the positions that it computed.

When a request goes on under new weights, either its KV stays what the old ones made of it (a frozen request), or the KV of all
that it has is made anew (a retracted one); the rows of tokens that were there stay the old ones' in both.
What is made anew has no rows that anybody sees: if two experts tie there, rounding may give the rest another KV, which excuses too.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.judge import Tally
from tests.support.reference import TIE_LOGITS, Reference, Trace, compare

Span = Sequence[Any]
"""`[start, stop, version]`."""


class VersionJudge:
    """`keeps_kv(old, new)` says whether requests were frozen, and not retracted, when `new` came after `old`."""

    def __init__(self, checkpoints: dict[str, Path], keeps_kv: Callable[[str, str], bool]) -> None:
        self._references = {version: _CachedReference(folder) for version, folder in checkpoints.items()}
        self._keeps_kv = keeps_kv

    def add(
        self, tally: Tally, prompt: Sequence[int], output_ids: Sequence[int], rows: np.ndarray, spans: Sequence[Span]
    ) -> None:
        """Count one greedy answer with all its rows `[P+G-1, L, K]` and the spans that it reports."""
        tokens = [*prompt, *output_ids[:-1]]
        assert [spans[0][0], spans[-1][1]] == [0, len(tokens)], f"{spans} do not cover {len(tokens)} positions"
        assert all(left[1] == right[0] for left, right in pairwise(spans)), spans
        assert len(rows) == len(tokens)
        trace, has_hidden_tie = self.trace(tokens, spans)
        comparison = compare(trace, rows)
        tally.requests += 1
        tally.rows += comparison.num_rows
        wrong, excused = comparison.differing_rows > 0, comparison.is_tie or has_hidden_tie
        for logits, token_id in zip(trace.logits[len(prompt) - 1 :], output_ids, strict=True):
            if not wrong and int(logits.argmax()) != token_id:
                wrong, excused = True, has_hidden_tie or float(logits.max() - logits[token_id]) <= TIE_LOGITS
        tally.ties += wrong and excused
        tally.wrong += wrong and not excused

    def trace(self, tokens: Sequence[int], spans: Sequence[Span]) -> tuple[Trace, bool]:
        """What the models of these versions compute, each over its own positions; and whether experts tie in what is hidden."""
        parts: list[Trace] = []
        cache: Any = None
        has_hidden_tie = False
        for index, (start, stop, version) in enumerate(spans):
            reference = self._references[version]
            if index > 0 and not self._keeps_kv(spans[index - 1][2], version):
                hidden, cache = reference.extend(tokens[:start], None)
                has_hidden_tie |= _has_tie(hidden)
            part, cache = reference.extend(tokens[start:stop], cache)
            parts.append(part)
        whole = Trace(*(np.concatenate([getattr(part, name) for part in parts]) for name in Trace.__slots__))
        return whole, has_hidden_tie


def _has_tie(trace: Trace) -> bool:
    """Whether rounding alone could have chosen another expert anywhere."""
    top_k = trace.expert_ids.shape[-1]
    ranked = np.sort(trace.router_logits, -1)
    return bool((ranked[..., -top_k] - ranked[..., -top_k - 1] <= TIE_LOGITS).any())


class _CachedReference(Reference):
    """transformers' model, a piece of a sequence at a time, upon the KV of whichever model computed the pieces before."""

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], cache: Any) -> tuple[Trace, Any]:
        """Compute the next positions; `cache` is changed."""
        model, outputs = self._model, {}

        def with_cache(**fields: Any) -> Any:
            outputs["last"] = model(**(fields | {"use_cache": True, "past_key_values": cache}))
            return outputs["last"]

        self._model = with_cache
        try:
            return self.trace(tokens), outputs["last"].past_key_values
        finally:
            self._model = model
