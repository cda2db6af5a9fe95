"""The processes that plans strike: two pairs that can be held, short deadlines, and whoever ends is started again.

Neighbours: `held` (the workers), `gates` (where they ask), `stack_place` (runs plans over this).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from deploy.launch_options import Roles
from deploy.roles import tandem_roles
from deploy.stack import Stack, running_stack
from tests.fault.held import GATE

FLAGS = [
    "--device=cpu",
    "--cpu-threads=1",
    "--prefill=2",
    "--decode=2",
    "--restart",
    "--max-restarts=100",
    "--fence-deadline-s=6",
    "--page-size=4",
    "--prefill.chunked-prefill-tokens=16",
    "--prefill.kv-pool-tokens=4096",
    "--decode.kv-pool-tokens=512",
    "--heartbeat-s=0.2",
    "--peer-deadline-s=2",
    "--lease-s=5",
    "--transfer-deadline-s=10",
    # So much longer than a peer's silence that a stopped engine's peer is the first to notice, and not its frontend.
    "--engine-deadline-s=4",
    "--health-interval-s=0.3",
    "--unhealthy-after-s=2",
]


@contextmanager
def held_stack(checkpoint: Path, log_file: Path) -> Iterator[tuple[Stack, Path]]:
    """Run the processes; gives them and the path of the socket at which they ask."""
    # A socket's path must be short, which a test's own folder is not.
    with tempfile.TemporaryDirectory(prefix="gate-") as folder, pytest.MonkeyPatch.context() as environment:
        secret, gate = Path(folder) / "secret", Path(folder) / "gate"
        secret.write_text("a secret for these tests")
        environment.setenv(GATE, str(gate))
        roles = tandem_roles()
        held: Roles = {
            **roles,
            "prefill": replace(roles["prefill"], module="tests.fault.held"),
            "decode": replace(roles["decode"], module="tests.fault.held"),
        }
        flags = [f"--model={checkpoint}", f"--secret-file={secret}", *FLAGS]
        with running_stack(flags, roles=held, log_file=log_file) as stack:
            yield stack, gate
