"""The prefill worker as a process: its flags, and the frontend that serves HTTP and starts the engine processes.

Neighbours: `common.server.frontend` (all of the frontend), `prefill_worker.engine_process` (a child).
"""

from common.config import parse_config
from common.errors import UsageError
from common.server.frontend import run_frontend
from prefill_worker.config import PrefillConfig

_MAX_PORT = 65535


def read_config(argv: list[str]) -> PrefillConfig:
    """Read the worker's flags; UsageError for what cannot be used."""
    description = "Tandem's prefill worker: computes prompts and hands their KV over."
    config = parse_config(PrefillConfig, argv, prog="python -m prefill_worker", description=description)
    port, dp = config.prefill.bootstrap_port, config.engine.dp
    if port + dp - 1 > _MAX_PORT:
        raise UsageError(f"--bootstrap-port {port}: {dp} groups listen from there on, which is beyond {_MAX_PORT}")
    return config


def main(argv: list[str], *, engine_module: str = "prefill_worker.engine_process") -> int:
    """Run the worker; returns the exit code."""
    config = read_config(argv)
    return run_frontend("prefill", config, engine_module=engine_module, bootstrap_port=config.prefill.bootstrap_port)
