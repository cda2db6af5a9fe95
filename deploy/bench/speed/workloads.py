"""The workloads by name, the prompts that they send, and what is aimed at on each; all of it data.

Names stand for requests x prompt tokens x output tokens, all submitted at once. It measures nothing. Neighbours:
`offline` and `online` (run them), `results` (sets the figures against the targets).
"""

from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from common.errors import UsageError
from common.models.config import ModelConfig

Merit = Literal["output", "input"]
RowsForm = Literal["off", "int32", "msgpack"]


class Workload(Struct, frozen=True):
    """So many requests of equal length at once. `merit` says which tokens a second are counted."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    merit: Merit = "output"

    @property
    def unit(self) -> str:
        """Of the figure of merit."""
        return f"{self.merit} tok/s"

    @property
    def num_rows(self) -> int:
        """Rows of one request, `[0, P+G-1)`."""
        return self.prompt_tokens + self.output_tokens - 1

    def tokens_per_s(self, wall_s: float) -> float:
        """The figure of merit, for the time from the first submission to the last answer."""
        return self.requests * (self.output_tokens if self.merit == "output" else self.prompt_tokens) / wall_s


WORKLOADS: Final = {
    each.name: each
    for each in (
        Workload("b1", 1, 128, 256),
        Workload("ref16", 16, 13, 32),
        Workload("b16", 16, 1024, 256),
        Workload("b64", 64, 1024, 256),
        Workload("b256", 256, 1024, 256),
        Workload("prefill", 16, 8192, 1, "input"),
        Workload("long", 1, 32000, 32, "input"),
    )
}

INTERFERENCE: Final = "itl-under-prefill"


class Targets(Struct, frozen=True):
    """What one command is to reach: tokens/s by workload, and the part of it that returning rows may leave."""

    tokens_per_s: dict[str, float]
    rows_over_off: dict[tuple[str, str], float]
    """By workload ("*": any) and form of the rows."""

    def of_rows(self, workload: str, form: str) -> float | None:
        """The least ratio of rows over no rows; None without one."""
        return self.rows_over_off.get((workload, form), self.rows_over_off.get(("*", form)))


OFFLINE_TARGETS: Final = Targets(
    {"b1": 300, "ref16": 1250, "b16": 1200, "b64": 2900, "b256": 6200, "prefill": 53000, "long": 26000},
    {(name, "rows"): 0.99 for name in ("b1", "b64", "b256", "prefill")},
)
ONLINE_TARGETS: Final = Targets(
    {"ref16": 1250, "b1": 230, "b16": 1160, "b64": 2850, "b256": 6400, "long": 20000},
    {("*", "int32"): 0.97, ("*", "msgpack"): 0.99},
)
NO_TARGETS: Final = Targets({}, {})


def is_target_shape(config: ModelConfig) -> bool:
    """Whether the model has the shape of Qwen3-30B-A3B, which the targets are about."""
    shape = (config.num_hidden_layers, config.hidden_size, config.num_experts, config.top_k)
    return shape == (48, 2048, 128, 8) and len(config.moe_layer_ids) == 48


def parse_workloads(names: str) -> list[str]:
    """Split a comma-separated list; every name is one of the table's, NxPxG or the interference. Raises UsageError."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name != INTERFERENCE:
            workload_of(name)
    if not chosen:
        raise UsageError("--workload: names none")
    return chosen


def workload_of(name: str) -> Workload:
    """Look a workload up, or make one of NxPxG. Raises UsageError."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    sizes = name.split("x")
    if len(sizes) != 3 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        known = ", ".join(WORKLOADS)
        raise UsageError(f"--workload {name}: there are {known}, and NxPxG for requests, prompt and output tokens")
    requests, prompt_tokens, output_tokens = map(int, sizes)
    return Workload(name, requests, prompt_tokens, output_tokens, "input" if output_tokens == 1 else "output")


def make_prompts(
    num_prompts: int, prompt_tokens: int, *, vocab_size: int, seed: int, serial: int
) -> npt.NDArray[np.int64]:
    """Draw prompts `[num_prompts, prompt_tokens]` of ids in `[0, vocab_size)`; each serial of a seed has others."""
    return np.random.default_rng([seed, serial]).integers(vocab_size, size=(num_prompts, prompt_tokens))
