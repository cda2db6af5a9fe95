"""Requests over real workers, each through a router of its own in this process, and what their answers must be.

A router knows the struck pair alone and does not try again, or it knows the other pair too; it picks the struck one first.
Neighbour: `stack_place`, which says which pair that is.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from common.config import ServerOptions
from common.process import free_port
from deploy.launch_plan import Command
from router.app import create_app
from router.config import RouterConfig, RouterOptions
from tests.fault.client import Asked
from tests.fault.held import MARK
from tests.fault.plan import Who
from tests.support.http_client import rows_in
from tests.support.judge import Judge, Tally
from tests.support.stub_workers import serving

POLL_S = 0.05
PROMPT_TOKENS = 40
NEW_TOKENS = 60

Pair = tuple[Command, Command]
"""A prefill worker and a decode worker."""


class Requests:
    """Makes requests whose answers are known; no two prompts begin alike, so that none comes from a cache."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._serials = itertools.count()

    def ask(self, url: str, *, stream: bool, has_another: bool = False, new_tokens: int = NEW_TOKENS) -> Asked:
        """Send one."""
        serial = next(self._serials)
        rng = random.Random(serial)
        prompt = [MARK, *(rng.randrange(8, 500) for _ in range(PROMPT_TOKENS - 1))]
        body = {
            "rid": f"request-{serial:04d}",
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
            "return_routed_experts": True,
            "routed_experts_dtype": "auto",
            "stream": stream,
        }
        return Asked(url, body, lambda reply: self._differs(prompt, reply), has_another_pair=has_another)

    def _differs(self, prompt: list[int], reply: dict[str, Any]) -> str:
        meta, output_ids = reply["meta_info"], reply["output_ids"]
        if meta["finish_reason"]["type"] == "abort" and not output_ids:
            return "rows without tokens" if "routed_experts" in meta else ""
        rows, tally = rows_in(meta), Tally()
        if len(rows) != len(prompt) + len(output_ids) - 1:
            return f"{len(rows)} rows for {len(prompt)} and {len(output_ids)} tokens"
        self._judge.add(tally, prompt, output_ids, rows)
        return f"{tally} for {prompt}" if tally.wrong else ""


@asynccontextmanager
async def router_over(pairs: Sequence[Pair], *, missing: Who | None = None) -> AsyncIterator[str]:
    """Serve a router that takes these pairs in turn, and tries again if there are several; nobody is where `missing` should be.

    Yields its URL.
    """
    prefill = [(worker.url, worker.addresses[1][1]) for worker, _ in pairs]
    decode = [worker.url for _, worker in pairs]
    nowhere = f"http://127.0.0.1:{free_port()}"
    if missing == "prefill":
        prefill[0] = (nowhere, prefill[0][1])
    elif missing == "decode":
        decode[0] = nowhere
    options = RouterOptions(
        prefill=tuple(prefill),
        decode=tuple(decode),
        policy="round_robin",
        max_retries=2 if len(pairs) > 1 else 0,
        # Whoever is missing must be found out by the request.
        health_interval_s=0.3 if missing is None else 3600.0,
        unhealthy_after_s=2.0,
    )
    app = await create_app(RouterConfig(router=options, server=ServerOptions(request_deadline_s=60.0)))
    async with serving(app) as url:
        yield url


async def until_idle(url: str) -> None:
    """Wait until a router counts no leg as in flight; it hears a moment later that a client has left."""
    async with aiohttp.ClientSession() as session:

        async def look() -> bool:
            async with session.get(f"{url}/workers") as response:
                return not any(worker["outstanding_requests"] for worker in (await response.json())["workers"])

        await until_so(look)


async def until_so(look: Callable[[], Awaitable[bool]]) -> None:
    """Ask another process again and again, until it says yes."""
    while True:
        if await look():
            return
        await asyncio.sleep(POLL_S)
