"""Workers that can be held inside of a step or a write. `python -m tests.fault.held FLAGS...`, prefill or decode by its flags.

Before each step with a marked prompt, and before each write, an engine asks at the socket that `GATE` names, if there is
one, and waits until that has closed the connection. So whoever strikes then strikes in that stage for certain. Neighbour:
`gates`, the other end.
"""

import contextlib
import os
import socket

from common.engine.build import EngineParts
from common.engine.engine import Engine
from common.engine.step import Launched
from common.process import run_main
from common.scheduling.step_plan import StepPlan
from decode_worker import engine_process as decode_engine
from decode_worker import process as decode
from prefill_worker import engine_process as prefill_engine
from prefill_worker import process as prefill
from transfer import group
from transfer.agent import NixlAgent, Write

GATE = "TANDEM_TEST_GATE"
MARK = 7
"""The first token of a prompt whose steps may be held."""


def ask(stage: str, count: int) -> None:
    """Wait here for as long as somebody wants that."""
    path = os.environ.get(GATE, "")
    if not os.path.exists(path):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"{stage} {count} {os.getpid()}\n".encode())
        connection.recv(1)


class HeldPrefill(Engine):
    """Asks before a chunk that is not its prompt's first."""

    def launch(self, plan: StepPlan) -> Launched:
        """Launch, in the end."""
        if any(entry.request.prompt[0] == MARK and entry.start > 0 for entry in plan.entries):
            ask("prefill", 1)
        return super().launch(plan)


class HeldDecode(Engine):
    """Asks before each step, and says how many marked requests are in it."""

    def launch(self, plan: StepPlan) -> Launched:
        """Launch, in the end."""
        num_marked = sum(entry.request.prompt[0] == MARK for entry in plan.entries)
        if num_marked:
            ask("decode", num_marked)
        return super().launch(plan)


class HeldAgent(NixlAgent):
    """Asks before it posts a write."""

    num_writes = 0

    def write(self, peer: str, local_pages: list[int], remote_pages: list[int], tag: bytes) -> Write:
        """Post a write, in the end."""
        self.num_writes += 1
        ask("transfer", self.num_writes)
        return super().write(peer, local_pages, remote_pages, tag)


def main(argv: list[str]) -> int:
    """Run the frontend, or the engine process that it starts with this same module."""
    is_prefill = any(word.startswith("--bootstrap-port") for word in argv)
    if argv[0].startswith("--"):
        return (prefill if is_prefill else decode).main(argv, engine_module="tests.fault.held")
    if is_prefill:
        vars(group)["NixlAgent"] = HeldAgent
        prefill_engine.main(argv, EngineParts(engine=HeldPrefill))
    else:
        decode_engine.main(argv, EngineParts(engine=HeldDecode))
    return 0


if __name__ == "__main__":
    run_main(main)
