"""The decode worker as a process: its flags, and the frontend that serves HTTP and starts the engine processes.

Neighbours: `common.server.frontend` (all of the frontend), `decode_worker.engine_process` (a child).
"""

from common.config import parse_config
from common.server.frontend import run_frontend
from decode_worker.config import DecodeConfig


def read_config(argv: list[str]) -> DecodeConfig:
    """Read the worker's flags; UsageError for what cannot be used."""
    description = "Tandem's decode worker: continues prompts that a prefill worker has computed."
    return parse_config(DecodeConfig, argv, prog="python -m decode_worker", description=description)


def main(argv: list[str], *, engine_module: str = "decode_worker.engine_process") -> int:
    """Run the worker; returns the exit code."""
    config = read_config(argv)
    return run_frontend("decode", config, engine_module=engine_module)
