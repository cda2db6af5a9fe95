"""The reference: transformers' own model run over a sequence, what its routers chose, and the comparison with our rows.

It imports nothing of the engine, so that it cannot share an error with it. It knows no HTTP and no reply format; rows
come in as plain arrays.

Shape letters: P positions, V vocabulary, L MoE layers, E experts, K top-k, R compared positions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

TIE_LOGITS = 2e-5
"""Two experts whose router logits are this close may be swapped by float32 rounding alone."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward pass over a whole sequence, on the host."""

    logits: npt.NDArray[np.float32]
    """`[P, V]`, or `[1, V]` of the last position if the others were not asked for."""
    router_logits: npt.NDArray[np.float32]
    """`[P, L, E]`, before the softmax."""
    expert_ids: npt.NDArray[np.int64]
    """`[P, L, K]`, likeliest first."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a compared row and the reference chose different experts. `layer` counts MoE layers alone."""

    position: int
    layer: int
    expected: tuple[int, ...]
    got: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What comparing `[R, L, K]` ids with the reference gave; a row here is one position in one MoE layer."""

    num_rows: int
    differing_rows: int
    """Rows whose sets of experts differ."""
    order_differs: int
    """Rows of equal sets in another order; harmless to a trainer that looks the weights up by id."""
    first_difference: Difference | None
    """Of the sets: lowest position, then lowest layer. Later differences may only be its consequences."""
    is_tie: bool
    """The first difference is one swap of two experts whose logits lie within the tolerance."""


class Reference:
    """transformers' model of a checkpoint folder, with a hook on every router."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "eager"
    ) -> None:
        """Load the checkpoint; raises what transformers raises. `attention` is one of its implementations' names."""
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        self._model = self._model.to(device).eval()
        self._device = device
        self._routers = [module for module in self._model.modules() if type(module).__name__.endswith("TopKRouter")]
        if not self._routers:
            raise ValueError(f"{folder}: {type(self._model).__name__} has no top-k router to watch")

    @torch.inference_mode()
    def trace(self, tokens: Sequence[int], *, all_logits: bool = True) -> Trace:
        """Run the sequence in one pass; `all_logits=False` keeps only the last position's, for long sequences."""
        logits_LPE: list[torch.Tensor] = []
        ids_LPK: list[torch.Tensor] = []

        def watch(router: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
            # What a router returns besides the ids has changed between versions, so the logits are computed again.
            ids_LPK.append(next(out for out in outputs if not out.is_floating_point()))
            logits_LPE.append(F.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), router.weight))

        hooks = [router.register_forward_hook(watch) for router in self._routers]
        try:
            input_ids = torch.tensor([list(tokens)], device=self._device)
            output = self._model(input_ids=input_ids, use_cache=False, logits_to_keep=0 if all_logits else 1)
        finally:
            for hook in hooks:
                hook.remove()
        return Trace(
            logits=output.logits[0].float().cpu().numpy(),
            router_logits=torch.stack(logits_LPE, dim=1).float().cpu().numpy(),
            expert_ids=torch.stack(ids_LPK, dim=1).cpu().numpy(),
        )

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], num_tokens: int, eos_ids: Collection[int] = ()) -> list[int]:
        """Continue greedily by at most `num_tokens` tokens; one of `eos_ids` ends it and is the last one returned."""
        generated: list[int] = []
        cache: Any = None
        step = list(prompt)
        while len(generated) < num_tokens and not (generated and generated[-1] in eos_ids):
            input_ids = torch.tensor([step], device=self._device)
            output = self._model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            step = [int(output.logits[0, -1].argmax())]
            generated += step
        return generated


def compare(trace: Trace, rows: npt.NDArray[Any], start: int = 0, *, tie_logits: float = TIE_LOGITS) -> Comparison:
    """Compare `[R, L, K]` expert ids of positions `[start, start + R)` with the reference's.

    Raises ValueError if the shape does not fit the trace.
    """
    expected = trace.expert_ids[start : start + len(rows)]
    if start < 0 or rows.shape != expected.shape:
        raise ValueError(
            f"rows {list(rows.shape)} from {start} do not fit the reference {list(trace.expert_ids.shape)}"
        )
    rows = rows.astype(np.int64)
    differs = (np.sort(rows, axis=-1) != np.sort(expected, axis=-1)).any(axis=-1)
    reordered = (rows != expected).any(axis=-1) & ~differs
    first = None
    if differs.any():
        row, layer = (int(index) for index in np.argwhere(differs)[0])
        first = Difference(start + row, layer, tuple(expected[row, layer].tolist()), tuple(rows[row, layer].tolist()))
    return Comparison(
        num_rows=differs.size,
        differing_rows=int(differs.sum()),
        order_differs=int(reordered.sum()),
        first_difference=first,
        is_tie=first is not None and _is_tie(trace, first, tie_logits),
    )


def _is_tie(trace: Trace, difference: Difference, tie_logits: float) -> bool:
    only_expected = set(difference.expected) - set(difference.got)
    only_got = set(difference.got) - set(difference.expected)
    num_experts = trace.router_logits.shape[-1]
    if len(only_expected) != 1 or len(only_got) != 1 or not 0 <= min(only_got) < num_experts:
        return False
    logits_E = trace.router_logits[difference.position, difference.layer]
    return abs(float(logits_E[only_expected.pop()]) - float(logits_E[only_got.pop()])) <= tie_logits
