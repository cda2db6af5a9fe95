"""What a model needs computed around its matrix products: the seam between models and kernels.

`common.kernels.torch_kernels` computes it in torch on any device, as transformers does; `common.kernels.fused_kernels` in few
launches on a GPU. Attention has a seam of its own, `common.kernels.attention`, because it is planned once a step.

Shape letters: T tokens, D hidden size, H query heads, h key/value heads, d head size, E experts, K top-k, I expert width,
P positions, S sampled positions, V vocabulary.
"""

from typing import Protocol

import torch


class Kernels(Protocol):
    """The layer's operations. None of them waits for the device."""

    def add_norm(
        self, x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `delta` to `x_TD` and norm the sum; returns sum and normed sum, `[T, D]`.

        `delta` is what `experts` or a matrix product returned: `[T, D]`, `[T, K, D]` to be added up over K, or None for nothing.
        """

    def norm_rotate_store(
        self,
        qkv: torch.Tensor,
        q_norm_d: torch.Tensor,
        k_norm_d: torch.Tensor,
        eps: float,
        cos_Pd: torch.Tensor,
        sin_Pd: torch.Tensor,
        positions_T: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys of `qkv` `[T, (H + 2h) * d]`, store keys and values; returns queries `[T, H, d]`.

        The tables hold every position's cosines and sines; the caches are one layer's views `[page, h, slot in page, d]`.
        """

    def experts(
        self,
        hidden_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        gate_up_E2ID: torch.Tensor,
        down_EDI: torch.Tensor,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        counts_E: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Route each token to its K experts and run them; returns `[T, D]`, or `[T, K, D]` still to be added up over K.

        The chosen ids are written to `ids_TK` (any integer dtype, maybe strided). `counts_E` (int32 zeros) is for whoever needs to
        count them. From token `num_tokens` on (one int64 on the device) a padded batch holds no tokens: nothing is promised of
        their rows, and nobody's result depends on them.
        """

    def draw(
        self,
        logits_SV: torch.Tensor,
        temperatures_S: torch.Tensor,
        seeds_S: torch.Tensor,
        positions_S: torch.Tensor,
        *,
        all_greedy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token from each row without filters: token ids int64 and logprobs float32 of the unscaled logits, `[S]`.

        A pure function of each row's logits (any floating dtype), temperature (greedy under 1e-6), seed and position (R17).
        `all_greedy` says what the temperatures say too, and saves work.
        """
