"""A worker over stand-ins for ranks: `python -m tests.support.stub_ranks_worker FLAGS...`, those of an aggregated worker."""

from common.process import run_main
from common.server.frontend import run_frontend
from deploy.aggregated_config import read_config


def main(argv: list[str]) -> int:
    """Run the frontend."""
    return run_frontend("aggregated", read_config(argv), engine_module="tests.support.stub_ranks")


if __name__ == "__main__":
    run_main(main)
