"""The aggregated worker as a process, `python -m deploy.aggregated_worker`: the frontend, which starts the engine processes.

Neighbours: `common.server.frontend` (all of the frontend), `deploy.aggregated_engine` (a child).
"""

from common.process import run_main
from common.server.frontend import run_frontend
from deploy.aggregated_config import read_config


def main(argv: list[str]) -> int:
    """Run the worker; returns the exit code."""
    return run_frontend("aggregated", read_config(argv), engine_module="deploy.aggregated_engine")


if __name__ == "__main__":
    run_main(main)
