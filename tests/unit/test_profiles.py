"""Profiles over real engines: what is recorded, for how long, into which file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.engine.profiles import STEP, RankProfiler
from common.orders import Done, Order, ProfileActivity, StartProfile, StopProfile
from common.ranks import Ranks
from tests.support.aggregated import InProcessAggregated
from tests.support.in_process_pair import options_of
from tests.support.rank_threads import AggregatedRanks

BOTH: tuple[ProfileActivity, ...] = ("CPU", "GPU")
REQUESTS = [([5, 6, 7], options_of(4, ignore_eos=True))]
STEPS = 4
"""Of `REQUESTS`: one for the prompt, and one for each token but the first."""


@pytest.fixture
def worker(checkpoint_of: Callable[[str], Path]) -> InProcessAggregated:
    return InProcessAggregated(checkpoint_of("plain"), page_size=4, overlap=False)


def start(folder: Path, num_steps: int | None = None) -> StartProfile:
    return StartProfile(serial=1, folder=str(folder), kind="aggregated", activities=BOTH, num_steps=num_steps)


def told(worker: InProcessAggregated, *orders: Order) -> list[str | None]:
    answers: list[Done] = []
    for order in orders:
        worker.loop.order(order, answers.append)
    worker.turn()
    return [done.error for done in answers]


def steps_in(path: Path) -> int:
    """How many steps a trace has; they do something."""
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert "aten::linear" in names
    return names.count(STEP)


def test_what_runs_between_start_and_stop_is_recorded(worker: InProcessAggregated, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    assert told(worker, start(folder)) == [None]
    worker.run(REQUESTS)
    assert told(worker, StopProfile(2)) == [None]
    [path] = folder.iterdir()
    assert path.name == "aggregated-engine.trace.json.gz"
    assert steps_in(path) == STEPS
    worker.run(REQUESTS)
    assert told(worker, start(folder), StopProfile(3)) == [None, None]
    assert sorted(path.name for path in folder.iterdir()) == [
        "aggregated-engine-2.trace.json.gz",
        "aggregated-engine.trace.json.gz",
    ]


def test_a_recording_ends_by_itself_after_so_many_steps(worker: InProcessAggregated, tmp_path: Path):
    assert told(worker, start(tmp_path, num_steps=2)) == [None]
    worker.run(REQUESTS)
    assert told(worker, StopProfile(2)) == [None], "which waits for the file alone"
    [path] = tmp_path.iterdir()
    assert steps_in(path) == 2
    assert told(worker, start(tmp_path, num_steps=1)) == [None]
    worker.run(REQUESTS)
    assert told(worker, start(tmp_path), StopProfile(2)) == [None, None], (
        "it has ended, if nobody has asked for it or not"
    )


def test_what_does_not_fit_is_refused(worker: InProcessAggregated, tmp_path: Path):
    assert told(worker, StopProfile(1)) == ["no profile is being recorded"]
    (tmp_path / "file").touch()
    [error] = told(worker, start(tmp_path / "file"))
    assert error is not None
    assert "FileExistsError" in error
    assert told(worker, start(tmp_path), start(tmp_path)) == [None, "a profile is being recorded already"]
    assert told(worker, StopProfile(2), StopProfile(3)) == [None, "no profile is being recorded"]


def test_a_trace_that_cannot_be_written_is_an_error(worker: InProcessAggregated, tmp_path: Path):
    folder = tmp_path / "folder"
    assert told(worker, start(folder)) == [None]
    worker.run(REQUESTS)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    [error] = told(worker, StopProfile(2))
    assert error is not None
    assert told(worker, StopProfile(3)) == ["no profile is being recorded"]


def test_nothing_is_recorded_when_nobody_wants_it(worker: InProcessAggregated, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RankProfiler, "_end", None)
    monkeypatch.setattr("common.engine.profiles.profile", None)
    worker.run(REQUESTS)


def test_every_rank_has_a_file(checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Followers count steps of their own. Each thread here is a process elsewhere: torch has one profiler in each."""
    monkeypatch.setattr("common.engine.profiles.profile", FakeProfile)
    (tmp_path / "ranks").mkdir()
    worker = AggregatedRanks(checkpoint_of("plain"), Ranks(tp=2), tmp_path / "ranks", page_size=4)
    # A follower's last file is there before it has ended its last step.
    monkeypatch.setattr("common.engine.profiles._Writing", write_at_once)
    worker.run([REQUESTS], orders=[start(tmp_path / "traces", num_steps=3)])
    files = {path.name: path.read_text() for path in (tmp_path / "traces").iterdir()}
    assert files == {f"aggregated-engine-{rank}.trace.json.gz": "a trace" for rank in (0, 1)}


def write_at_once(recorder: "FakeProfile", path: Path) -> None:
    recorder.export_chrome_trace(str(path))


class FakeProfile:
    """In the place of torch's."""

    def __init__(self, activities: object) -> None:
        self.is_running = False

    def start(self) -> None:
        self.is_running = True

    def stop(self) -> None:
        assert self.is_running

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text("a trace")
