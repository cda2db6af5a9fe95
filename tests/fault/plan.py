"""Plans as data: what goes wrong, where, in which stage of a request, and how the request must end.

The files are in `tests/fault/plans`, one for each place, each an array of [[plan]]; `tests/fault/coverage.toml` lists what
they must cover. A word that no struct here knows is an error. Neighbours: `runner` (runs a plan), `stub_place`,
`loopback_place` and `stack_place` (where).
"""

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

FOLDER = Path(__file__).parent

Who = Literal["prefill", "decode", "router", "client"]
Stage = Literal["connect", "queued", "prefill", "transfer", "decode", "reply"]
End = Literal["answer", "aborted", "error", "left", "lost"]
"""`aborted`: an answer cut short because somebody asked for that; `left`: the client went; `lost`: its connection did."""
Fault = Literal[
    # a worker's answer
    "http-400",
    "http-429",
    "http-500",
    "reset-before-reply",
    "reset-in-reply",
    "abort-not-requested",
    "silence",
    # a process
    "SIGKILL engine",
    "SIGSTOP engine",
    "SIGSTOP-SIGCONT engine",
    "SIGKILL frontend",
    "SIGSTOP-SIGCONT frontend",
    "SIGTERM",
    "hang",
    "nobody there",
    "restart under load",
    # a client
    "leave",
    "abort",
    # messages and writes
    "drop",
    "delay",
    "duplicate",
    "truncate",
    "never asks",
    # rows and pages
    "zero rows",
    "unwritten rows",
    "exhaust",
    "too large",
]
What = Literal[
    "write", "Hello", "HelloReply", "Heartbeat", "HeartbeatReply", "KvRequest", "KvAbort", "KvDone", "KvClosed"
]


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault, and how every request that meets it ends.

    `leg`, `error_stage` and `status` are those of the error; the status is 200 for a stream that had begun. Where either of two
    may be the first to notice there are two stages. `error_stage` of an aborted answer is what its message says. A request that
    has another pair to go to, and whose client has heard nothing yet, is answered instead of failing, unless `is_retried` is
    false.
    """

    name: str
    covers: tuple[str, ...]
    where: Literal["stubs", "loopback", "stack"]
    who: Who
    stage: Stage
    fault: Fault
    what: What | None = None
    """Which message is dropped, delayed, duplicated or truncated."""
    stream: bool | Literal["both"] = "both"
    expect: End
    leg: Literal["prefill", "decode"] | None = None
    error_stage: str | tuple[str, ...] | None = None
    status: int | None = None
    is_retried: bool = True
    within_s: float = 20.0
    """In which all its requests must have ended."""

    @property
    def error_stages(self) -> tuple[str | None, ...]:
        """The stages that the error may name."""
        return self.error_stage if isinstance(self.error_stage, tuple) else (self.error_stage,)


class PlanFile(Struct, frozen=True, forbid_unknown_fields=True):
    """One file."""

    plan: list[Plan]


class Coverage(Struct, frozen=True, forbid_unknown_fields=True):
    """What must be covered: rows of the failure table, faults of the target, and what tests without a plan cover."""

    rows: list[str]
    faults: list[str]
    elsewhere: dict[str, str]
    """Of some of them: the test's file, from the repository's root."""


def read_plans(where: str | None = None, folder: Path = FOLDER / "plans") -> list[Plan]:
    """Read all plans, or those of one place. Raises msgspec.ValidationError for a word that is not known."""
    plans: list[Plan] = []
    for path in sorted(folder.glob("*.toml")):
        plans += msgspec.toml.decode(path.read_bytes(), type=PlanFile).plan
    return [plan for plan in plans if where in (None, plan.where)]


def read_coverage() -> Coverage:
    """Read what the plans must cover."""
    return msgspec.toml.decode((FOLDER / "coverage.toml").read_bytes(), type=Coverage)
