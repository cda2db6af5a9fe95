"""What a rank does, recorded by torch's profiler into a file that chrome://tracing and Perfetto read.

    start -> step, around each launch -> stop, or so many steps -> the file is written, beside the loop
Neighbours: `common.engine.orders` (starts and stops it), `common.engine.engine` and `follower` (launch steps).
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.errors import UsageError
from common.orders import ProfileActivity, StartProfile
from common.ranks import Rank

STEP: Final = "launch a step"
"""What a step's launch is called in a trace."""

_NOTHING: Final = nullcontext()


class RankProfiler:
    """One rank's recordings, one at a time; of one thread, that which launches the steps. Costs nothing while there is none."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._recording: tuple[profile, Path] | None = None
        self._steps_left: int | None = None
        self._writing: _Writing | None = None
        """Of a recording that has ended, until somebody has asked for it."""

    def start(self, order: StartProfile) -> None:
        """Begin. Raises UsageError if a recording runs, OSError if there can be no file in the folder."""
        if self._recording is not None:
            raise UsageError("a profile is being recorded already")
        self._writing = None
        path = _new_file(Path(order.folder), f"{order.kind}-{self._rank.process_name}")
        recorder = profile(activities=self._activities(order.activities))
        recorder.start()
        self._recording, self._steps_left = (recorder, path), order.num_steps

    def step(self) -> AbstractContextManager[None]:
        """A step is launched inside of this; it is marked in the trace."""
        return _NOTHING if self._recording is None else self._marked()

    @contextmanager
    def _marked(self) -> Iterator[None]:
        with record_function(STEP):
            yield
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self._end()

    def stop(self) -> None:
        """End the recording, if it has not ended by itself, and wait for its file.

        Raises UsageError if there was none, OSError or RuntimeError if there is no file.
        """
        self._end()
        if self._writing is None:
            raise UsageError("no profile is being recorded")
        writing, self._writing = self._writing, None
        writing.wait()

    def _end(self) -> None:
        if self._recording is not None:
            recorder, path = self._recording
            self._recording = None
            recorder.stop()
            self._writing = _Writing(recorder, path)

    def _activities(self, wanted: tuple[ProfileActivity, ...]) -> list[ProfilerActivity]:
        has_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU] if "CPU" in wanted or not has_gpu else []
        return [*activities, ProfilerActivity.CUDA] if "GPU" in wanted and has_gpu else activities


class _Writing:
    """The writing of a trace, on a thread of its own: it may take longer than an engine may be silent."""

    def __init__(self, recorder: profile, path: Path) -> None:
        self._error: OSError | RuntimeError | None = None
        self._thread = threading.Thread(target=self._write, args=(recorder, path), name="profile", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the file is there; raises what came in between."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self, recorder: profile, path: Path) -> None:
        try:
            recorder.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self._error = error


def _new_file(folder: Path, name: str) -> Path:
    """Make an empty file that nobody else has: several workers may write to one folder, and one several times."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{name}{'' if number == 1 else f'-{number}'}.trace.json.gz"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers do not end")
