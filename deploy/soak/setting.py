"""The stack that is soaked: two workers of each role on the CPU, small pools, and short deadlines that fit together.

The deadlines suit a tiny model, and are long enough that a process on a busy machine is not taken for a dead one. How long
a fault stops a process follows from them. Neighbours: `command` (starts the stack), `faults`.
"""

HEARTBEAT_S = 0.5
PEER_DEADLINE_S = 3.0
ENGINE_DEADLINE_S = 4.0
FENCE_DEADLINE_S = 6.0
LEASE_S = 10.0

PAUSED_S = (0.5, 2.0)
"""Shorter than every deadline: nobody has to notice."""
OUTLASTED_S = (PEER_DEADLINE_S + HEARTBEAT_S, ENGINE_DEADLINE_S + FENCE_DEADLINE_S / 2)
"""The peers have given up, the launcher, which counts from the engine's deadline on, has not."""
QUIET_DEADLINE_S = 4 * LEASE_S
"""After the last request everything is given back by then."""

FLAGS = [
    "--prefill=2",
    "--decode=2",
    "--device=cpu",
    "--cpu-threads=1",
    "--restart",
    # The faults are ours.
    "--max-restarts=1000",
    # A worker's pages are used again soon, prompts take several steps, and requests are swapped.
    "--context-tokens=512",
    "--page-size=4",
    "--prefill.kv-pool-tokens=4096",
    "--decode.kv-pool-tokens=1536",
    "--prefill.chunked-prefill-tokens=64",
    f"--engine-deadline-s={ENGINE_DEADLINE_S}",
    f"--fence-deadline-s={FENCE_DEADLINE_S}",
    f"--heartbeat-s={HEARTBEAT_S}",
    f"--peer-deadline-s={PEER_DEADLINE_S}",
    f"--lease-s={LEASE_S}",
    "--transfer-deadline-s=12",
    "--health-interval-s=0.5",
    "--health-timeout-s=1",
    "--unhealthy-after-s=3",
    "--connect-deadline-s=2",
    "--breaker-pause-s=1",
    "--prefill-deadline-s=15",
    "--first-token-deadline-s=15",
    "--idle-deadline-s=10",
    # Every request ends before its client's deadline, whatever happens.
    "--router.request-deadline-s=40",
]
