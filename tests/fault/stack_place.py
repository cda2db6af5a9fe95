"""Plans over real processes: two prefill and two decode workers that can be held in every stage, started again when they end.

A process fault meets four requests at once: streams and not, with another pair to go to and without. The struck pair is the
one that has been started least often. Plans about the router go through the stack's own one, and those about clients need no
other pair.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from deploy.stack import Stack
from tests.fault.client import Asked
from tests.fault.gates import Hold, holding
from tests.fault.plan import Plan
from tests.fault.runner import Outcome, check_pages
from tests.fault.stack_requests import Pair, Requests, router_over, until_idle, until_so
from tests.support.judge import Judge

QUIET_WITHIN_S = 60.0
STARTED_WITHIN_S = 120.0
LOAD = 24
CROWD = 12
TOO_MANY_TOKENS = 600


class StackPlace:
    """The processes, and the requests that are among them."""

    def __init__(self, stack: Stack, gate: Path, judge: Judge) -> None:
        self.stack = stack
        self._workers = {command.name: command for command in stack.plan.commands if command.role != "router"}
        self._gate = gate
        self._requests = Requests(judge)
        self._complaints: list[str] = []
        self._struck: dict[str, int] = {}
        """Who is to be started again, and the number of that start."""

    async def strike(self, plan: Plan) -> list[Outcome]:
        """Bring the plan's requests into its stage, and strike there."""
        async with AsyncExitStack() as self._routers:
            match plan.fault:
                case "restart under load":
                    asked = await self._restart_under_load()
                case "exhaust":
                    asked = await self._exhaust()
                case "too large":
                    asked = [await self._ask(stream=stream, new_tokens=TOO_MANY_TOKENS) for stream in (False, True)]
                case "nobody there":
                    asked = await self._ask_all(plan)
                case _:
                    asked = await self._strike_in_stage(plan)
            outcomes = [await each.outcome() for each in asked]
            for url in {each.url for each in asked} - {self.stack.url}:
                await until_idle(url)
        return outcomes

    async def leftovers(self, plan: Plan) -> list[str]:
        """Wait until every worker is there again and holds nothing, and say what it still holds if it does not."""
        complaints, self._complaints = self._complaints, []
        for name, num_starts in self._struck.items():
            await self.stack.wait_started(name, num_starts, deadline_s=STARTED_WITHIN_S)
        self._struck.clear()
        left: list[str] = []

        async def look() -> bool:
            left[:] = await self._held(session)
            return left == []

        async with aiohttp.ClientSession() as session:
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIET_WITHIN_S):
                    await until_so(look)
        complaints += left
        if plan.who == "router":
            outcome = await self._requests.ask(self.stack.url, stream=False).outcome()
            complaints += [] if (outcome.end, outcome.wrong) == ("answer", "") else [f"not served again: {outcome}"]
        return complaints

    # -------------------------------------------------------------------------------------------- faults

    async def _strike_in_stage(self, plan: Plan) -> list[Asked]:
        prefill, decode = self._pair()
        async with self._held_in(plan) as (asked, hold):
            match plan.fault:
                case "leave":
                    for each in asked:
                        each.leave()
                case "abort":
                    for each in asked:
                        await self._abort(each)
                case "hang":
                    await asyncio.wait([each.ended for each in asked])
                case _:
                    name = {"router": "router", "prefill": prefill.name, "decode": decode.name}[plan.who]
                    await self._signal(plan, name, asked, hold)
        return asked

    async def _signal(self, plan: Plan, name: str, asked: list[Asked], hold: Hold) -> None:
        """Signal a process and let everybody else go on; if it is to be continued, then after the end of all requests."""
        signals, _, which = plan.fault.partition(" ")
        first, _, last = signals.partition("-")
        pid = self.stack.engine_pids(name)[0] if which == "engine" else self.stack.pid(name)
        if not last:
            self._struck[name] = self.stack.num_starts(name) + 1
        os.kill(pid, signal.Signals[first])
        hold.release()
        if last:
            await asyncio.wait([each.ended for each in asked])
            os.kill(pid, signal.Signals[last])

    async def _restart_under_load(self) -> list[Asked]:
        """Kill both workers of a pair once the first of many requests has been answered."""
        url = await self._routers.enter_async_context(router_over([self._pair(0), self._pair(1)]))
        asked = [self._requests.ask(url, stream=False, has_another=True) for _ in range(LOAD)]
        await asyncio.wait([each.ended for each in asked], return_when=asyncio.FIRST_COMPLETED)
        for worker in self._pair():
            self._struck[worker.name] = self.stack.num_starts(worker.name) + 1
            os.kill(self.stack.engine_pids(worker.name)[0], signal.SIGKILL)
        return asked

    async def _exhaust(self) -> list[Asked]:
        """Ask for more tokens at once than the decode pool holds."""
        _, decode = self._pair()
        async with aiohttp.ClientSession() as session:
            num_swaps = (await self._get(session, f"{decode.url}/server_info"))["stats"]["swaps"]
            asked = [await self._ask(stream=i % 2 == 0) for i in range(CROWD)]
            await asyncio.wait([each.ended for each in asked])
            if (await self._get(session, f"{decode.url}/server_info"))["stats"]["swaps"] == num_swaps:
                self._complaints.append("nobody was swapped: there was room for all")
        return asked

    async def _abort(self, asked: Asked) -> None:
        url = f"{asked.url}/abort_request"
        async with aiohttp.ClientSession() as session, session.post(url, json={"rid": asked.rid}) as response:
            assert response.status == 200, await response.text()

    # -------------------------------------------------------------------------------------------- stages

    @asynccontextmanager
    async def _held_in(self, plan: Plan) -> AsyncIterator[tuple[list[Asked], Hold]]:
        """Have the plan's requests in its stage, and keep them there until the block is left, or the hold released."""
        asked: list[Asked] = []
        num_writes = itertools.count()
        is_it: Callable[[int], bool] = {
            "prefill": lambda _: True,
            "queued": lambda _: True,
            # One request may have a single write, several have several.
            "transfer": lambda _: next(num_writes) == (plan.who != "client"),
            # The stack's own router spreads them.
            "decode": lambda num_marked: num_marked == len(asked) or plan.who == "router",
        }[plan.stage]
        async with holding(self._gate, "prefill" if plan.stage == "queued" else plan.stage, is_it) as hold:
            asked += await self._ask_all(plan)
            await hold.reached
            match plan.stage:
                case "queued":
                    asked.append(await self._ask(stream=False))
                case "transfer":
                    await self._until_prefilled()
                case "decode":
                    for each in asked:
                        if each.is_stream:
                            await each.told()
            yield asked, hold

    async def _until_prefilled(self) -> None:
        """Wait until the struck prefill worker has answered, so that only the transfer is left."""
        prefill, _ = self._pair()
        async with aiohttp.ClientSession() as session:

            async def look() -> bool:
                return (await self._get(session, f"{prefill.url}/v1/loads"))["open_requests"] == 0

            await until_so(look)

    # -------------------------------------------------------------------------------------------- requests

    def _pair(self, index: int = 0) -> Pair:
        """The struck pair, or with index 1 the other one. The order stays as it is until the struck ones are back."""

        def num_starts(name: str) -> int:
            return self._struck.get(name, self.stack.num_starts(name) + 1)

        prefill = sorted(self.stack.names("prefill"), key=num_starts)[index]
        decode = sorted(self.stack.names("decode"), key=num_starts)[index]
        return self._workers[prefill], self._workers[decode]

    async def _ask_all(self, plan: Plan) -> list[Asked]:
        """Send the plan's requests: what `stream` says, and unless it is about a client or the router with and without a choice."""
        streams = [False, True] if plan.stream == "both" else [plan.stream]
        if plan.who == "router":
            return [self._requests.ask(self.stack.url, stream=stream) for stream in streams]
        choices = [False] if plan.who == "client" else [False, True]
        return [
            await self._ask(stream=stream, has_another=has_another, plan=plan)
            for stream in streams
            for has_another in choices
        ]

    async def _ask(self, *, stream: bool, has_another: bool = False, plan: Plan | None = None, **options: int) -> Asked:
        pairs = [self._pair(0), self._pair(1)] if has_another else [self._pair()]
        missing = plan.who if plan is not None and plan.fault == "nobody there" else None
        url = await self._routers.enter_async_context(router_over(pairs, missing=missing))
        return self._requests.ask(url, stream=stream, has_another=has_another, **options)

    # -------------------------------------------------------------------------------------------- leftovers

    async def _held(self, session: aiohttp.ClientSession) -> list[str]:
        """Say what all workers hold, and what the stack's own router does not take for well."""
        complaints: list[str] = []
        for name, command in self._workers.items():
            try:
                stats = (await self._get(session, f"{command.url}/server_info"))["stats"]
            except (aiohttp.ClientError, OSError) as error:
                complaints.append(f"{name}: {error!r}")
                continue
            counts = {key: stats[key] for key in ("queued_requests", "running_requests", "rooms")}
            complaints += check_pages(name, stats["pages"], **counts)
        for worker in (await self._get(session, f"{self.stack.url}/workers"))["workers"]:
            if worker["outstanding_requests"] or not worker["healthy"]:
                complaints.append(f"the stack's router: {worker}")
        return complaints

    async def _get(self, session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
        """Ask, with the deadline of whoever waits; raises aiohttp.ClientError unless the answer is 200."""
        async with session.get(url, raise_for_status=True) as response:
            answer: dict[str, Any] = await response.json()
        return answer
