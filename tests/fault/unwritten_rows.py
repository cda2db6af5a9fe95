"""A prefill worker whose commits are suppressed: rows stay unwritten. `python -m tests.fault.unwritten_rows FLAGS...`."""

from common.engine.build import EngineParts
from common.process import run_main
from common.routed_experts.host_cache import HostCache, Rows, WriteTicket
from prefill_worker import engine_process, process


class UnwrittenRows(HostCache):
    """Loses every row."""

    def commit(self, ticket: WriteTicket, rows: Rows) -> None:
        """Do nothing."""


def main(argv: list[str]) -> int:
    """Run the frontend, or the engine process that it starts with this same module."""
    if not argv[0].startswith("--"):
        engine_process.main(argv, EngineParts(host_cache=UnwrittenRows))
        return 0
    return process.main(argv, engine_module="tests.fault.unwritten_rows")


if __name__ == "__main__":
    run_main(main)
