"""Processes that are not our own children: who is below one of them, and when those are gone (Linux)."""

import os
import select
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """The process ids of all children of `pid`, in the order of their start; none if it is gone."""
    entries = [(_parent_and_start_of(entry), int(entry.name)) for entry in Path("/proc").glob("[0-9]*")]
    children = [(found[1], child) for found, child in entries if found is not None and found[0] == pid]
    # Of two that were started within one tick the later one has the larger number, nearly always.
    return [child for _, child in sorted(children)]


def _parent_and_start_of(entry: Path) -> tuple[int, int] | None:
    try:
        stat = (entry / "stat").read_text()
    except OSError:
        return None  # it has ended meanwhile
    # The name, the second field, is in brackets, and may have brackets and spaces of its own.
    fields = stat.rpartition(")")[2].split()
    return int(fields[1]), int(fields[19])


class Processes:
    """Processes held on to by pidfds, which no later process with the same id can be mistaken for."""

    def __init__(self, pids: list[int]) -> None:
        self._pidfds: list[int] = []
        for pid in pids:
            try:
                self._pidfds.append(os.pidfd_open(pid))
            except ProcessLookupError:
                continue  # gone already

    def are_gone(self) -> bool:
        """Whether all of them have ended, every thread and with it all that they held."""
        poll = select.poll()
        for pidfd in self._pidfds:
            poll.register(pidfd, select.POLLIN)
        return len(poll.poll(0)) == len(self._pidfds)

    def close(self) -> None:
        """Let go of them."""
        while self._pidfds:
            os.close(self._pidfds.pop())
