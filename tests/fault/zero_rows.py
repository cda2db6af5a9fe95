"""A prefill worker that commits zeros in the place of every row. `python -m tests.fault.zero_rows FLAGS...`."""

from common.engine.build import EngineParts
from common.process import run_main
from common.routed_experts.host_cache import HostCache, Rows, WriteTicket
from prefill_worker import engine_process, process


class ZeroRows(HostCache):
    """Marks rows as written, and writes zeros."""

    def commit(self, ticket: WriteTicket, rows: Rows) -> None:
        """Commit zeros."""
        super().commit(ticket, rows * 0)


def main(argv: list[str]) -> int:
    """Run the frontend, or the engine process that it starts with this same module."""
    if not argv[0].startswith("--"):
        engine_process.main(argv, EngineParts(host_cache=ZeroRows))
        return 0
    return process.main(argv, engine_module="tests.fault.zero_rows")


if __name__ == "__main__":
    run_main(main)
