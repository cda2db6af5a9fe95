"""What a model needs computed around its matrix products: the seam between models and kernels.

`common.kernels.torch_kernels` computes it in torch on any device, as transformers does; `common.kernels.fused_kernels` in few
launches on a GPU. Attention has a seam of its own, `common.kernels.attention`, because it is planned once a step.

Shape letters: T tokens, D hidden size, H query heads, h key/value heads, d head size, E experts, K top-k, I expert width,
P positions, S sampled positions, V vocabulary, M attention groups, N lanes of all groups.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Lanes:
    """How the tokens of M attention groups stand side by side in a padded step: each group has `per_group` lanes, filled from the
    first one on. Lane n belongs to group `n // per_group` and holds a token if `n % per_group < num_tokens_M[n // per_group]`.
    """

    num_tokens_M: torch.Tensor
    """int64, on the device."""
    per_group: int


FP8_BLOCK = 128
"""Rows, and columns, of a block of float8 weights with one scale, where products take them as they are stored."""


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One matrix of each expert, as they are stored."""

    weight: torch.Tensor
    """`[E, rows, columns]`, in the hidden dtype, or float8_e4m3fn with scales."""
    scale: torch.Tensor | None = None
    """float32 `[E, rows / FP8_BLOCK, columns / FP8_BLOCK]`: what the numbers of each block are to be multiplied by."""

    def __post_init__(self) -> None:
        """Kernels go from block to block without a look at the shapes."""
        if self.scale is not None:
            assert self.weight.dtype == torch.float8_e4m3fn
            assert [size * FP8_BLOCK for size in self.scale.shape[1:]] == list(self.weight.shape[1:])

    def of(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix of one expert, multiplied by its scales in float32 and rounded once."""
        if self.scale is None:
            return self.weight[expert]
        scale = self.scale[expert].repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return (self.weight[expert].float() * scale).to(dtype)


class PeerArea(NamedTuple):
    """Memory of this GPU that the other ranks of a group read, and where theirs is; good for one sum.

    Whoever reads it first waits for the others' signals: it was another area that all of them read last.
    """

    own: torch.Tensor
    """Where this rank puts its part, in the part's shape and dtype."""
    addresses_R: torch.Tensor
    """int64, on the device: of every rank's part."""
    signals_R: torch.Tensor
    """int64, on the device: of every rank's zeros, int32 `[T, R]`, and zeros again afterwards."""
    place: int
    """This rank's number among the R."""


class Peers(Protocol):
    """The ranks of a group, each with a part of a sum."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Add up all ranks' tensors, maybe in place; the same bits on each."""

    def area(self, partial: torch.Tensor) -> PeerArea | None:
        """Where all ranks can read each other's parts; None if these are too large, or the GPUs cannot."""


class Kernels(Protocol):
    """The layer's operations. None of them waits for the device."""

    @property
    def native_fp8(self) -> bool:
        """Whether the experts' matrices are to be float8, as the checkpoint has them, and not dequantised."""

    def add_norm(
        self, x_TD: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `delta` to `x_TD` and norm the sum; returns sum and normed sum, `[T, D]`.

        `delta` is what `experts` or a matrix product returned: `[T, D]`, `[T, K, D]` to be added up over K, or None for nothing.
        """

    def add_norm_over(
        self, x_TD: torch.Tensor, partial_TD: torch.Tensor, peers: Peers, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `add_norm` with the sum of what all `peers` have computed."""

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
        gate_up_E2ID: ExpertMatrices,
        down_EDI: ExpertMatrices,
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

    def add_up(self, delta: torch.Tensor) -> torch.Tensor:
        """What `experts` returned, as `[T, D]`: added up over K if it is not yet, for whoever needs the sum before the norm."""

    def route(
        self,
        hidden_TD: torch.Tensor,
        gate_ED: torch.Tensor,
        *,
        norm_topk_prob: bool,
        ids_TK: torch.Tensor,
        num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """The first half of `experts`: choose, and write the ids to `ids_TK`; returns weights `[T, K]` in the hidden dtype.

        From token `num_tokens` on a padded batch holds no tokens: their ids stay as they were, and of their weights nothing is
        promised, not even that they are numbers.
        """

    def run_experts(
        self,
        hidden_ND: torch.Tensor,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        gate_up_E2ID: ExpertMatrices,
        down_EDI: ExpertMatrices,
        *,
        first_expert: int,
        lanes: Lanes | None,
    ) -> torch.Tensor:
        """Run tokens through those of their experts that are here; returns the sum over these, `[N, D]`.

        Here are the experts `[first_expert, first_expert + E)`, whole or a part of their width. A token none of whose
        experts is here gets zeros, and so does a lane that holds no token, whatever its hidden state, ids and weights are; without
        `lanes` all N hold one. `ids_NK` may be of any integer dtype and strided; hidden states and weights are contiguous.
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
