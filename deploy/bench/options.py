"""The benchmark command's options, which every benchmark gets whole, and its one kind of failure."""

from typing import Annotated, Literal

from msgspec import Struct

from common.config import option
from common.errors import TandemError
from deploy.replay.workload import SHIPPED_WORKLOAD


class BenchError(TandemError):
    """Something that was to be measured failed, so the round means nothing."""


class BenchOptions(Struct, frozen=True, kw_only=True):
    """What to measure, and on what."""

    only: Annotated[str, option("run these benchmarks alone", metavar="NAME[,NAME]")] = ""
    rounds: Annotated[int, option("rounds of each kind, after one of each to warm up", unit="rounds", ge=1)] = 5
    scale: Annotated[
        float, option("shrinks sizes and durations; at less than 1 the figures mean little", gt=0, le=1)
    ] = 1.0
    json: Annotated[str, option("write the result there too", metavar="FILE")] = ""
    model: Annotated[str, option("rows_on_off: checkpoint; default: the demo model", metavar="PATH_OR_ID")] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], option("rows_on_off: where the model runs")] = "cpu"
    concurrency: Annotated[int, option("rows_on_off: requests under way at a time", unit="requests", ge=1)] = 16
    max_new_tokens: Annotated[int, option("rows_on_off: for each prompt", unit="tokens", ge=1)] = 32
    workload: Annotated[str, option("rows_on_off: prompts, one JSON object a line", metavar="FILE.jsonl")] = str(
        SHIPPED_WORKLOAD
    )

    def scaled(self, count: int, *, least: int = 1) -> int:
        """Shrink a count by the scale."""
        return max(least, round(count * self.scale))


class BenchConfig(Struct, frozen=True):
    """The command's config."""

    bench: BenchOptions = BenchOptions()
