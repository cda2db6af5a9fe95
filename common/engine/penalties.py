"""What changes logits before a token is drawn: penalties by what came before, biases, and stops that may not come yet.

Which tokens a request has generated is counted on the device, by the step that samples them, so that with overlap the next
step needs nothing from the host. The counts of a row are set anew whenever another request takes it; they are a function of
the request's tokens alone, so a resumed request goes on as if nothing had happened (R17).

Shape letters: S sampled positions, R rows of the request table, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.engine.device import Array, Device, as_int64
from common.scheduling.request import Request
from common.scheduling.step_plan import StepEntry

Upload = Callable[[Array], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """The changes of one step's draws, on the device. None where no draw of the step asks for them."""

    rows_S: torch.Tensor
    penalties_S3: torch.Tensor | None
    """float32 `[S, 3]`: repetition (1: none), frequency and presence (0: none)."""
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Draw, token id, and what is added to the logit; -inf for a token that may not come yet."""


class TokenCounts:
    """How often each row's request has generated each token, and which tokens its prompt has; allocated when first needed."""

    def __init__(self, num_rows: int, vocab_size: int, device: Device) -> None:
        self._shape = (num_rows, vocab_size)
        self._device = device
        self._owners: list[Request | None] = [None] * num_rows
        self._generated_RV: torch.Tensor | None = None
        self._in_prompt_RV: torch.Tensor | None = None

    def changes_of(
        self, draws: Sequence[StepEntry], rows_S: torch.Tensor, eos_ids: Sequence[int], upload: Upload
    ) -> LogitChanges | None:
        """Gather the changes of one step's draws, each at its entry's `stop`; None if no draw asks for any.

        `draws` are the entries that the draws belong to, and `rows_S` their rows on the device. A step without a row that
        `RequestTable.changes_logits` has none.
        """
        requests = [entry.request for entry in draws]
        params = [request.message.options.sampling for request in requests]
        penalties = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        any_penalty = any(penalty != (1.0, 0.0, 0.0) for penalty in penalties)
        changed_draws: list[int] = []
        tokens: list[int] = []
        biases: list[float] = []
        for draw, (entry, sampling) in enumerate(zip(draws, params, strict=True)):
            changed = dict(sampling.logit_bias)
            if entry.stop - entry.request.num_prompt_tokens < sampling.min_new_tokens:
                changed |= dict.fromkeys([*eos_ids, *sampling.stop_token_ids], -np.inf)
            changed_draws += [draw] * len(changed)
            tokens += changed.keys()
            biases += changed.values()
        if not any_penalty and not changed_draws:
            return None
        if any_penalty:
            self._own(
                [request for request, penalty in zip(requests, penalties, strict=True) if penalty != (1.0, 0.0, 0.0)]
            )
        return LogitChanges(
            rows_S=rows_S,
            penalties_S3=upload(np.asarray(penalties, dtype=np.float32)) if any_penalty else None,
            biases=(
                upload(as_int64(changed_draws)),
                upload(as_int64(tokens)),
                upload(np.asarray(biases, dtype=np.float32)),
            )
            if changed_draws
            else None,
        )

    def apply(self, logits_SV: torch.Tensor, changes: LogitChanges) -> torch.Tensor:
        """Return changed logits: penalties first (repetition, then frequency and presence), biases last."""
        logits_SV = logits_SV.to(torch.float32, copy=True)
        if changes.penalties_S3 is not None:
            assert self._generated_RV is not None
            assert self._in_prompt_RV is not None
            repetition_S1, frequency_S1, presence_S1 = changes.penalties_S3.T.unsqueeze(-1)
            generated_SV = self._generated_RV[changes.rows_S]
            seen_SV = (generated_SV > 0) | self._in_prompt_RV[changes.rows_S]
            divided_SV = torch.where(logits_SV > 0, logits_SV / repetition_S1, logits_SV * repetition_S1)
            logits_SV = torch.where(seen_SV, divided_SV, logits_SV)
            logits_SV = logits_SV - frequency_S1 * generated_SV - presence_S1 * (generated_SV > 0)
        if changes.biases is not None:
            draws, tokens, biases = changes.biases
            logits_SV.index_put_((draws, tokens), biases, accumulate=True)
        return logits_SV

    def count(self, changes: LogitChanges, tokens_S: torch.Tensor) -> None:
        """Count what was drawn, for the next step."""
        if changes.penalties_S3 is not None:
            assert self._generated_RV is not None
            ones_S = torch.ones_like(tokens_S, dtype=self._generated_RV.dtype)
            self._generated_RV.index_put_((changes.rows_S, tokens_S), ones_S, accumulate=True)

    def _own(self, requests: Sequence[Request]) -> None:
        """Set the counts of rows that have changed hands, from the tokens that the host knows."""
        if self._generated_RV is None:
            device = self._device.torch_device
            self._generated_RV = torch.zeros(self._shape, dtype=torch.int32, device=device)
            self._in_prompt_RV = torch.zeros(self._shape, dtype=torch.bool, device=device)
        assert self._in_prompt_RV is not None
        for request in requests:
            if self._owners[request.row] is request:
                continue
            # Whoever comes back to a row after a time in another one must not find the counts of its first time here.
            self._owners = [None if owner is request else owner for owner in self._owners]
            self._owners[request.row] = request
            vocab_size = self._shape[1]
            # What earlier legs of the sample have generated comes at the prompt's end.
            num_own = request.num_prompt_tokens - request.message.options.resumed_tokens
            generated_ids = np.concatenate((request.prompt[num_own:], as_int64(request.output_ids)))
            generated = np.bincount(generated_ids, minlength=vocab_size).astype(np.int32)
            in_prompt = np.bincount(request.prompt[:num_own], minlength=vocab_size) > 0
            self._generated_RV[request.row] = self._device.upload(generated)
            self._in_prompt_RV[request.row] = self._device.upload(in_prompt)
