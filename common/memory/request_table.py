"""One row for each running request: its pages, its options in numbers, and the token that its next step starts from.

All but `last_tokens` is host memory, written when a request is seated and read by fancy indexing with the rows of a step, so
that a step costs a few array operations however many requests it has. `last_tokens` lives on the device, written by the
sampler of one step and read by the next: a sampled token feeds the next step without a trip through the host.

Shape letter: R rows of the table.
"""

import numpy as np
import numpy.typing as npt
import torch

from common.messages import RequestOptions

TOP_K_OFF = 2**31
"""In `top_ks`: more than any vocabulary has."""


class RequestTable:
    """`num_rows` rows of up to `pages_per_row` pages; a row is reused only once no step with its last owner is in flight.

    A column's entry of a row that nobody holds means nothing.
    """

    def __init__(self, num_rows: int, pages_per_row: int, device: torch.device) -> None:
        self.pages: npt.NDArray[np.int32] = np.zeros((num_rows, pages_per_row), dtype=np.int32)
        """`[num_rows, pages_per_row]`; only the entries that a plan's context covers mean anything."""
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """`[R]`: the token sampled last, on the device."""
        self.params_3R: npt.NDArray[np.float32] = np.zeros((3, num_rows), dtype=np.float32)
        """Temperature, top-p and min-p."""
        self.top_ks: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        """`TOP_K_OFF` where top-k is off."""
        self.seeds: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        """`[0, 2**63)`: of the row's own sample; a further draw n from the same logits has the seed + n."""
        self.is_filtered: npt.NDArray[np.bool_] = np.zeros(num_rows, dtype=np.bool_)
        """Whether top-k, top-p or min-p exclude anything."""
        self.changes_logits: npt.NDArray[np.bool_] = np.zeros(num_rows, dtype=np.bool_)
        """Whether `common.engine.penalties` has anything to look at."""
        self.num_top_logprobs: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.scored_from: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.scored_to: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        """Positions `[scored_from, scored_to)` predict prompt tokens whose logprobs are wanted; none if `scored_to` is 0."""
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows that no request holds."""
        return len(self._free)

    def allocate(self, pages: list[int], options: RequestOptions, *, seed: int, num_prompt_tokens: int) -> int:
        """Take a row for a request that holds `pages`; `seed` is the sample's own, which may not be its options'."""
        row = self._free.pop()
        sampling = options.sampling
        self.pages[row, : len(pages)] = pages
        self.params_3R[:, row] = sampling.temperature, sampling.top_p, sampling.min_p
        self.top_ks[row] = sampling.top_k if sampling.top_k > 0 else TOP_K_OFF
        self.seeds[row] = seed
        self.is_filtered[row] = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        self.changes_logits[row] = (
            penalties != (1.0, 0.0, 0.0) or bool(sampling.logit_bias) or sampling.min_new_tokens > 0
        )
        self.num_top_logprobs[row] = options.top_logprobs_num
        # Position p predicts token p + 1, and token 0 has no logprob.
        self.scored_from[row] = max(0, options.logprob_start_len - 1)
        is_scored = options.return_logprob and options.logprob_start_len >= 0
        self.scored_to[row] = num_prompt_tokens - 1 if is_scored else 0
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        assert row not in self._free, "a row was freed twice"
        self._free.append(row)
