"""Runs one plan: has its place strike, waits for the end of every request, and says what is not as the plan has it.

It knows no process and no network; the places do. What it gives back are complaints, so that it can be shown to complain.
"""

import asyncio
from typing import Protocol

from msgspec import Struct

from tests.fault.plan import End, Plan


class Outcome(Struct, frozen=True, kw_only=True):
    """How one request ended. `wrong` says in what an answer differs from the reference, "" if in nothing."""

    end: End
    wrong: str = ""
    leg: str | None = None
    stage: str | None = None
    status: int | None = None
    message: str = ""
    is_told: bool = False
    """Its client had heard something of an answer when it was struck."""
    has_another_pair: bool = False


class Place(Protocol):
    """Where plans run."""

    async def strike(self, plan: Plan) -> list[Outcome]:
        """Bring requests into the plan's stage, strike, and wait until every one of them has ended."""

    async def leftovers(self, plan: Plan) -> list[str]:
        """Say what is left of them once all has had its time to come back: pages, rooms, legs."""


async def run(plan: Plan, place: Place) -> list[str]:
    """Run a plan; gives what is wrong, nothing if all is as the plan has it."""
    try:
        async with asyncio.timeout(plan.within_s):
            outcomes = await place.strike(plan)
    except TimeoutError:
        return [f"a request has not ended within {plan.within_s:g} s"]
    complaints = [complaint for outcome in outcomes for complaint in judge(plan, outcome)]
    if not outcomes:
        complaints.append("no request was sent")
    return complaints + await place.leftovers(plan)


def judge(plan: Plan, outcome: Outcome) -> list[str]:
    """Compare a request's end with what the plan expects."""
    may_be_retried = plan.is_retried and outcome.has_another_pair and not outcome.is_told
    expected: End = "answer" if plan.expect == "error" and may_be_retried else plan.expect
    if outcome.end != expected:
        return [f"expected {expected}: {outcome}"]
    if outcome.wrong:
        return [f"a wrong answer: {outcome.wrong}"]
    if expected in ("aborted", "error") and outcome.stage not in plan.error_stages:
        return [f"expected stage {plan.error_stage}: {outcome}"]
    if expected == "error":
        named = (plan.leg, 200 if outcome.is_told else plan.status)
        if named != (outcome.leg, outcome.status):
            return [f"expected leg and status {named}: {outcome}"]
    return []


def check_pages(name: str, pages: dict[str, int], **counts: int) -> list[str]:
    """Say which of a worker's pages are not free, and what else of it is not 0."""
    held = {key: pages[key] for key in ("running", "quarantined", "unaccounted")} | counts
    complaints = [f"{name}: {count} {key}" for key, count in held.items() if count]
    if pages["free"] + pages["cached"] != pages["total"]:
        complaints.append(f"{name}: {pages['free']} free and {pages['cached']} cached pages of {pages['total']}")
    return complaints
