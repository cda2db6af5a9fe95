"""One outcome, judged: are its numbers consistent, its rows possible, and, with a reference, its rows and tokens right?

The reference runs over prompt plus output, so each token is judged by itself: an earlier one that differs does not
count again. Ties are excused and counted apart: see `Verdict.is_tie`.

Neighbours: `deploy.replay.check` (possible rows), `deploy.replay.reference` (right rows), `deploy.replay.report`
(sums).
"""

from typing import Any

import numpy as np
from msgspec import Struct

from deploy.answers import Ids, MalformedRowsError, WireReply, moe_layers_of, num_expected_rows, read_rows
from deploy.replay.check import RowCounts, check_rows
from deploy.replay.client import Outcome
from deploy.replay.reference import TIE_LOGITS, Comparison, Reference, Trace, compare


class Verdict(Struct, frozen=True, kw_only=True):
    """What is known of one request. `failure` means that no answer, or an inconsistent one, came back.

    `is_tie`: rows or tokens differ from the reference, but the first row that does swaps two experts whose logits are
    equal within float32 rounding, or the tokens that do have such logits. The differences are then not in the counts.
    """

    line: int
    latency_s: float
    failure: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    counts: RowCounts = RowCounts()
    rows_compared: int = 0
    rows_differ: int = 0
    rows_reordered: int = 0
    tokens_compared: int = 0
    tokens_differ: int = 0
    is_tie: bool = False


class Judge:
    """Judges outcomes by what the user knows: the prompts, the model's size if it is known, and perhaps a reference."""

    def __init__(
        self,
        *,
        rows: bool,
        greedy: bool,
        num_experts: int | None = None,
        tokenizer: Any = None,
        reference: Reference | None = None,
    ) -> None:
        self.num_experts = num_experts
        self._rows = rows
        self._greedy = greedy
        self._tokenizer = tokenizer
        self._reference = reference

    def judge(self, outcome: Outcome) -> Verdict:
        """Give the verdict on one outcome; with a reference this runs the model once."""
        line, latency_s, reply = outcome.sample.line, outcome.latency_s, outcome.reply
        if reply is None or outcome.failure is not None:
            return Verdict(line=line, latency_s=latency_s, failure=outcome.failure or "no reply")
        counts = RowCounts()
        num_output = len(reply.output_ids)
        failure = _inconsistency(outcome, reply)
        prompt_ids = self._prompt_ids(outcome)
        prompt_tokens = reply.meta_info.prompt_tokens if prompt_ids is None else len(prompt_ids)
        if prompt_tokens != reply.meta_info.prompt_tokens:
            failure = f"the prompt has {prompt_tokens} tokens, meta_info.prompt_tokens {reply.meta_info.prompt_tokens}"
        trace = None
        if self._reference is not None and prompt_ids is not None:
            trace = self._reference.trace([*prompt_ids, *reply.output_ids])
            self.num_experts = trace.router_logits.shape[-1]
        ids_RMK: Ids | None = None
        if self._rows:
            num_expected = num_expected_rows(prompt_tokens, num_output, reply.meta_info.routed_experts_start_len)
            try:
                ids_RMK, counts = self._check(reply, num_expected, trace)
            except MalformedRowsError as error:
                failure = f"malformed rows: {error}"
        comparison = _Compared()
        if trace is not None:
            try:
                comparison = _against_reference(trace, prompt_tokens, reply, ids_RMK, greedy=self._greedy)
            except ValueError as error:
                failure = failure or str(error)
        return Verdict(
            line=line,
            latency_s=latency_s,
            failure=failure,
            prompt_tokens=prompt_tokens,
            output_tokens=num_output,
            counts=counts,
            rows_compared=comparison.rows_compared,
            rows_differ=comparison.rows_differ,
            rows_reordered=comparison.rows_reordered,
            tokens_compared=comparison.tokens_compared,
            tokens_differ=comparison.tokens_differ,
            is_tie=comparison.is_tie,
        )

    def _prompt_ids(self, outcome: Outcome) -> list[int] | None:
        if outcome.sample.input_ids is not None or self._tokenizer is None:
            return outcome.sample.input_ids
        return list(self._tokenizer(outcome.sample.text).input_ids)

    def _check(self, reply: WireReply, num_expected: int, trace: Trace | None) -> tuple[Ids | None, RowCounts]:
        """The MoE layers' ids and their counts; where the reply has no rows at all, every expected one is missing."""
        ids_RLK = read_rows(reply.meta_info)
        if ids_RLK is None:
            moe_layer_ids = reply.meta_info.routed_experts_moe_layer_ids
            num_layers = trace.expert_ids.shape[1] if trace is not None else len(moe_layer_ids or [0])
            return None, RowCounts(missing=num_expected * num_layers)
        is_moe_L = moe_layers_of(reply.meta_info, ids_RLK.shape[1])
        counts = check_rows(ids_RLK, is_moe_L, num_expected=num_expected, num_experts=self.num_experts)
        return ids_RLK[:num_expected, is_moe_L], counts


class _Compared(Struct, frozen=True, kw_only=True):
    """The reference's part of a verdict."""

    rows_compared: int = 0
    rows_differ: int = 0
    rows_reordered: int = 0
    tokens_compared: int = 0
    tokens_differ: int = 0
    is_tie: bool = False


def _inconsistency(outcome: Outcome, reply: WireReply) -> str | None:
    num_output, told = len(reply.output_ids), reply.meta_info.completion_tokens
    if num_output != told:
        return f"{num_output} output_ids, but meta_info.completion_tokens is {told}"
    if num_output > outcome.sample.max_new_tokens:
        return f"{num_output} output_ids, but max_new_tokens was {outcome.sample.max_new_tokens}"
    if reply.meta_info.routed_experts_start_len != 0:
        return f"rows from {reply.meta_info.routed_experts_start_len} on, but all were asked for"
    return None


def _against_reference(
    trace: Trace, prompt_tokens: int, reply: WireReply, ids: Ids | None, *, greedy: bool
) -> _Compared:
    """Compare `[R, M, K]` ids and greedy tokens; raises ValueError if the rows' shape is not the model's."""
    rows = Comparison(0, 0, 0, None, False) if ids is None else compare(trace, ids)
    output = np.array(reply.output_ids, dtype=np.int64) if greedy else np.array([], dtype=np.int64)
    # The logits at position i choose the token at i + 1.
    positions = np.arange(len(output)) + prompt_tokens - 1
    logits = trace.logits[positions]
    behind = logits.max(axis=-1, initial=-np.inf) - logits[np.arange(len(output)), output]
    differs = logits.argmax(axis=-1) != output
    excused = differs & (behind <= TIE_LOGITS)
    if rows.is_tie and rows.first_difference is not None:
        # What was computed from the swapped row on is not what the reference computed.
        excused |= differs & (positions >= rows.first_difference.position)
    rows_differ = 0 if rows.is_tie else rows.differing_rows
    tokens_differ = int((differs & ~excused).sum())
    return _Compared(
        rows_compared=rows.num_rows,
        rows_differ=rows_differ,
        rows_reordered=rows.order_differs,
        tokens_compared=len(output),
        tokens_differ=tokens_differ,
        is_tie=(rows.is_tie or bool(excused.any())) and not rows_differ and not tokens_differ,
    )
