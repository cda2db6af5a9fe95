"""Where a step's time goes on the GPU: its kernels by total time, and the gaps between them; read from a chrome trace.

Times are microseconds. It starts no step: `offline` runs those inside of `torch.profiler`. A CPU's trace has no device
activities, and its profile is empty.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct
from rich.table import Table

_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_LONG_GAP_US = 100.0
_NAME_CHARS = 70
_TABLE_ROWS = 25


class Activity(NamedTuple):
    """A kernel or copy, from its start for its duration, on one stream."""

    name: str
    start_us: float
    duration_us: float
    stream: int


class Gaps(Struct, frozen=True, kw_only=True):
    """When nothing ran on a stream between its first activity and its last."""

    span_us: float
    idle_us: float
    largest_us: float
    num_over_100_us: int
    after_largest: str
    """The activity that the largest gap comes before; "" without gaps."""


class Kernel(Struct, frozen=True, kw_only=True):
    """All calls of one kernel; `share` is that of the total time of all activities."""

    name: str
    calls_per_step: float
    us_per_call: float
    us_per_step: float
    share: float


class Profile(Struct, frozen=True, kw_only=True):
    """Some steps of one workload; the kernels of all streams, most time first, the gaps of the busiest one after its first step."""

    workload: str
    phase: str
    num_steps: int
    gaps: Gaps | None
    """None if nothing ran on a device."""
    kernels: list[Kernel]


def make_profile(trace: Path, *, workload: str, phase: str, num_steps: int) -> Profile:
    """Read what the profiler has written of `num_steps` steps."""
    activities = read_activities(trace)
    main = main_stream(activities) if activities else []
    return Profile(
        workload=workload,
        phase=phase,
        num_steps=num_steps,
        gaps=find_gaps(without_first_step(main, num_steps)) if main else None,
        kernels=sum_kernels(activities, num_steps),
    )


def read_activities(trace: Path) -> list[Activity]:
    """Take the device's activities out of a chrome trace, which may be gzipped."""
    content = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    # The standard library's reader takes what the profiler may write: NaN, and control characters in names.
    events: list[dict[str, Any]] = json.loads(content.decode(errors="replace"), strict=False)["traceEvents"]
    return [
        Activity(event["name"], float(event["ts"]), float(event["dur"]), int(event["args"].get("stream", 0)))
        for event in events
        if event.get("cat") in _DEVICE_CATEGORIES and event.get("ph") == "X"
    ]


def main_stream(activities: Sequence[Activity]) -> list[Activity]:
    """The activities of the stream that was busy for the longest time."""
    busy_us: dict[int, float] = defaultdict(float)
    for activity in activities:
        busy_us[activity.stream] += activity.duration_us
    chosen = max(busy_us, key=lambda stream: busy_us[stream])
    return [activity for activity in activities if activity.stream == chosen]


def without_first_step(activities: Sequence[Activity], num_steps: int) -> list[Activity]:
    """Leave a stream's first step out: nothing is in flight when the profiler starts, so the device has to wait for that one."""
    begin = min(activity.start_us for activity in activities)
    end = max(activity.start_us + activity.duration_us for activity in activities)
    return [activity for activity in activities if activity.start_us >= begin + (end - begin) / num_steps] or list(
        activities
    )


def find_gaps(activities: Iterable[Activity]) -> Gaps:
    """Find when none of the activities, of which there is at least one, was running; they may overlap."""
    first, *others = sorted(activities, key=lambda activity: activity.start_us)
    busy_until = first.start_us + first.duration_us
    gaps: list[tuple[float, str]] = []
    for activity in others:
        if activity.start_us > busy_until:
            gaps.append((activity.start_us - busy_until, activity.name))
        busy_until = max(busy_until, activity.start_us + activity.duration_us)
    largest_us, after_largest = max(gaps, default=(0.0, ""))
    return Gaps(
        span_us=busy_until - first.start_us,
        idle_us=sum(gap for gap, _ in gaps),
        largest_us=largest_us,
        num_over_100_us=sum(gap > _LONG_GAP_US for gap, _ in gaps),
        after_largest=after_largest,
    )


def sum_kernels(activities: Iterable[Activity], num_steps: int) -> list[Kernel]:
    """Add up the calls of each name, most time first."""
    durations: dict[str, list[float]] = defaultdict(list)
    for activity in activities:
        durations[activity.name].append(activity.duration_us)
    total_us = sum(map(sum, durations.values()))
    return [
        Kernel(
            name=name,
            calls_per_step=len(calls) / num_steps,
            us_per_call=sum(calls) / len(calls),
            us_per_step=sum(calls) / num_steps,
            share=sum(calls) / total_us if total_us else 0.0,
        )
        for name, calls in sorted(durations.items(), key=lambda item: -sum(item[1]))
    ]


def short_name(name: str) -> str:
    """Shorten a kernel's name; what all of them have in front goes first."""
    for prefix in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.removeprefix(prefix)
    return name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 3] + "..."


def as_table(profile: Profile) -> Table:
    """The profile for people: the first kernels, all others as one line, and the time in which none ran."""
    table = Table(
        title=f"GPU time of {profile.num_steps} {profile.phase} steps of {profile.workload}", title_justify="left"
    )
    table.add_column("kernel", no_wrap=True)
    for name in ("calls/step", "us/call", "us/step", "share"):
        table.add_column(name, justify="right")
    shown, others = profile.kernels[:_TABLE_ROWS], profile.kernels[_TABLE_ROWS:]
    for each in shown:
        cells = (f"{each.calls_per_step:.2f}", f"{each.us_per_call:.1f}", f"{each.us_per_step:.1f}")
        # Brackets in a kernel's name are no markup.
        table.add_row(short_name(each.name).replace("[", r"\["), *cells, f"{each.share:.1%}")
    for name, kernels in ((f"{len(others)} others", others), ("all", profile.kernels)):
        calls, us, share = (sum(getattr(k, f) for k in kernels) for f in ("calls_per_step", "us_per_step", "share"))
        if kernels:
            table.add_section()
            table.add_row(name, f"{calls:.2f}", f"{us / calls:.1f}", f"{us:.1f}", f"{share:.1%}")
    gaps = profile.gaps
    if gaps is None:
        table.caption = "nothing ran on a device"
        return table
    table.caption_justify = "left"
    table.caption = (
        f"main stream: {gaps.span_us / profile.num_steps:,.1f} us a step, of which idle "
        f"{gaps.idle_us / profile.num_steps:,.1f} us ({gaps.idle_us / max(gaps.span_us, 1e-9):.1%}); total idle "
        f"{gaps.idle_us:,.0f} us, largest gap {gaps.largest_us:,.1f} us before {short_name(gaps.after_largest)}, "
        f"{gaps.num_over_100_us} gaps over 100 us"
    ).replace("[", r"\[")
    return table
