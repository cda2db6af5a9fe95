"""The engine processes of one worker, a child for each rank: they start together, and no rank outlives another.

The ranks compute in step, and whoever waits in a collective for one that is gone waits for ever: so when one ends, whatever
the reason, the others are killed at once. Neighbours: `frontend` (starts these), `common.ranks` (what a rank is).
"""

import asyncio
import contextlib

from common.process import EXIT_USAGE, spawn_async


class EngineProcesses:
    """Ranks in order; `start` makes them."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes
        self._ending = [asyncio.create_task(process.wait()) for process in processes]

    @classmethod
    async def start(cls, module: str, folder: str, num_ranks: int, flags: list[str]) -> "EngineProcesses":
        """Start `python -m module FOLDER RANK flags...` for each rank; what the ranks share lies in `folder`."""
        return cls([await spawn_async(module, [folder, str(rank), *flags]) for rank in range(num_ranks)])

    async def until_one_ends(self) -> str:
        """Wait until a rank has ended, then kill the others; returns which one it was and how it went."""
        await asyncio.wait(self._ending, return_when=asyncio.FIRST_COMPLETED)
        ended = [f"rank {rank} with exit code {end.result()}" for rank, end in enumerate(self._ending) if end.done()]
        self._kill()
        return ", ".join(ended)

    async def wait(self, deadline_s: float) -> None:
        """Wait until all have ended, and kill whoever has not when `deadline_s` have passed."""
        await asyncio.wait(self._ending, timeout=deadline_s)
        self._kill()
        await asyncio.wait(self._ending)

    @property
    def has_refused_usage(self) -> bool:
        """Whether a rank has ended because of options that cannot be used; it has said which, in one line."""
        return any(process.returncode == EXIT_USAGE for process in self._processes)

    def _kill(self) -> None:
        for process in self._processes:
            # One may have ended without the loop having been told so yet.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
