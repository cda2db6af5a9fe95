"""One key for the whole stack: who has it passes, nobody else."""

from collections.abc import Callable
from pathlib import Path

import aiohttp

from common.server.http import bearer
from deploy.stack import make_stack


async def test_a_key_guards_the_real_stack_and_opens_it(checkpoint_of: Callable[[str], Path], tmp_path: Path):
    """One --api-key for all: the launcher's own probe, the router's legs and a client with the key pass, nobody else."""
    flags = [f"--model={checkpoint_of('plain')}", "--device=cpu", "--cpu-threads=1", "--api-key=opener"]
    async with make_stack(flags, log_file=tmp_path / "log") as stack, aiohttp.ClientSession() as session:
        body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}
        for command in stack.plan.commands:
            async with session.post(f"{command.url}/generate", json=body) as response:
                assert response.status == 401
        async with session.post(f"{stack.url}/generate", json=body, headers=bearer("opener")) as response:
            assert response.status == 200
