"""`python -m deploy.demo`: the whole of Tandem once, on this machine, with a model made on the spot.

Writes the demo checkpoint into a cache folder (once), starts one prefill worker, one decode worker and the router as
separate processes, replays the shipped workload, compares every row and token with transformers' own model, and
prints the report. The exit code is 0 only if every row is right.

Neighbours: `deploy.demo_model` (the checkpoint), `deploy.stack` (the processes), `deploy.replay` (requests and report).
"""

import hashlib
import inspect
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from common.observability.logging import configure_logging
from common.process import run_main
from deploy import demo_model
from deploy.replay.command import ReplayOptions, replay_and_print
from deploy.stack import StackError, running_stack

REPOSITORY = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Run the demo; `argv` are flags for `deploy.up`, for example `--prefill 2`. Returns the exit code."""
    configure_logging("demo", "info")
    disable_progress_bar()
    checkpoint = demo_checkpoint()
    console = Console(stderr=True)
    console.print(f"checkpoint: {checkpoint}", soft_wrap=True)
    try:
        with running_stack([f"--model={checkpoint}", "--device=cpu", *argv]) as stack:
            summary = replay_and_print(ReplayOptions(url=stack.url, reference=str(checkpoint)))
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if summary.is_good:
        console.print("[green]every row is right[/]")
    return 0 if summary.is_good else 1


def demo_checkpoint() -> Path:
    """Give the folder of the demo checkpoint, written now unless an earlier run has."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or REPOSITORY / ".cache") / "tandem"
    # A changed recipe makes another folder, so that nobody is served the model of an earlier version.
    recipe = inspect.getsource(demo_model).encode() + demo_model.CORPUS.read_bytes()
    folder = cache / f"demo-model-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            written = Path(temporary) / "checkpoint"
            demo_model.write_demo_model(written)
            # Under its name only once it is whole: an interrupted run must not leave half a checkpoint behind.
            try:
                written.rename(folder)
            except OSError:
                # Another run has been faster, with the same bytes.
                if not folder.exists():
                    raise
    return folder


if __name__ == "__main__":
    run_main(main)
