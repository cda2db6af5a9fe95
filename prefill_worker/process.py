"""The prefill worker as a process: its flags, and the frontend that serves HTTP and starts the engine process.

Neighbours: `common.server.frontend` (all of the frontend), `prefill_worker.engine_process` (the child).
"""

from common.config import parse_config
from common.server.frontend import run_frontend
from prefill_worker.config import PrefillConfig


def read_config(argv: list[str]) -> PrefillConfig:
    """Read the worker's flags; UsageError for what cannot be used."""
    description = "Tandem's prefill worker: computes prompts and hands their KV over."
    return parse_config(PrefillConfig, argv, prog="python -m prefill_worker", description=description)


def main(argv: list[str], *, engine_module: str = "prefill_worker.engine_process") -> int:
    """Run the worker; returns the exit code."""
    config = read_config(argv)
    return run_frontend("prefill", config, engine_module=engine_module, bootstrap_port=config.prefill.bootstrap_port)
