"""The shell of every rank's process: `python -m ENGINE_MODULE FOLDER RANK flags...`, started by the worker's frontend.

In `FOLDER` the ranks of the worker, and its frontend, find each other. What leading and following mean is the role's to say.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from common.config import EngineOptions, ServerOptions
from common.engine.mates import Mates, find_mates
from common.messages import WorkerKind
from common.observability.logging import configure_logging
from common.process import run_and_leave


class RankConfig(Protocol):
    """What is read here of a role's config."""

    @property
    def engine(self) -> EngineOptions:
        """Which ranks there are."""

    @property
    def server(self) -> ServerOptions:
        """How much to log."""


Config = TypeVar("Config", bound=RankConfig)
Run = Callable[[Config, Mates], None]


def run_rank(
    argv: list[str],
    kind: WorkerKind,
    read_config: Callable[[list[str]], Config],
    *,
    lead: Run[Config],
    follow: Run[Config],
) -> None:
    """Find the rank's mates, then lead its attention group until the frontend says `Shutdown`, or follow its leader."""
    folder, index, *flags = argv
    config = read_config(flags)
    rank = config.engine.ranks.rank(int(index))
    configure_logging(f"{kind}/{rank.process_name}", config.server.log_level)
    mates = find_mates(rank, folder)

    def run() -> None:
        try:
            (lead if rank.is_leader else follow)(config, mates)
        finally:
            mates.close()

    if rank.of.tp == 1:
        run()
    else:
        run_and_leave(run)
