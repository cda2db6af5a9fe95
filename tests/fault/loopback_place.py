"""Plans over a pair of engines in one process: messages and writes lost, late, doubled and cut short, and ends that fall silent.

A test's clock moves, and whoever is stopped or dead does not turn. Rows and pages are those of real engines.
"""

from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from common.engine.build import EngineParts
from common.messages import FinishReason
from tests.fault.plan import Plan
from tests.fault.runner import Outcome, check_pages
from tests.fault.unwritten_rows import UnwrittenRows
from tests.fault.zero_rows import ZeroRows
from tests.support.in_process_pair import InProcessPair, Side, options_of
from tests.support.judge import Judge, Tally
from tests.support.transfer_bench import OPTIONS
from transfer.loopback import Fault

RID = "r"
PROMPT = [*range(20, 60)]
FAULTS = {
    "drop": Fault.DROP,
    "delay": Fault.DELAY,
    "duplicate": Fault.DUPLICATE,
    "truncate": Fault.TRUNCATE,
}
PARTS = {"zero rows": EngineParts(host_cache=ZeroRows), "unwritten rows": EngineParts(host_cache=UnwrittenRows)}
LONGEST_S = 3 * OPTIONS.transfer_deadline_s
"""After which every lease, deadline and tombstone has run out."""


class Policy:
    """The first of a kind meets a fault; as long as `holds_writes`, writes are late."""

    def __init__(self, plan: Plan) -> None:
        self.holds_writes = False
        self.was_met = False
        self._what = plan.what
        self._fault = FAULTS.get(plan.fault)

    def __call__(self, what: str) -> Fault:
        """Decide about a message or a write."""
        if what == self._what and not self.was_met and self._fault is not None:
            self.was_met = True
            return self._fault
        return Fault.DELAY if what == "write" and self.holds_writes else Fault.NONE


class LoopbackPlace:
    """A pair for one plan."""

    def __init__(self, checkpoint: Path, judge: Judge) -> None:
        self._checkpoint = checkpoint
        self._judge = judge
        self._patches = ExitStack()

    async def strike(self, plan: Plan) -> list[Outcome]:
        """Run one request, and meanwhile strike."""
        self._policy = Policy(plan)
        self._pair = pair = InProcessPair(
            self._checkpoint,
            page_size=4,
            chunk_tokens=16,
            faults=self._policy,
            transfer=OPTIONS,
            parts=PARTS.get(plan.fault, EngineParts()),
        )
        self._sides = {"prefill": pair.prefill, "decode": pair.decode}
        match plan.fault:
            case "never asks":
                pair.submit(RID, PROMPT, options_of(8), legs=("prefill",))
                pair.settle()
            case "drop" | "delay" | "duplicate" | "truncate":
                self._meet_a_fault(plan)
            case "zero rows" | "unwritten rows":
                pair.submit(RID, PROMPT, options_of(8))
                pair.settle()
            case _:
                self._strike_an_end(plan)
        return [self._outcome(plan)]

    async def leftovers(self, plan: Plan) -> list[str]:
        """Let all time pass that anybody waits for, and look for what is held then."""
        with self._patches:
            if plan.fault == "drop" and plan.what == "write":
                self._kill("prefill")  # what is in progress for ever needs a fence
            self._pair.sleep(LONGEST_S)
            return [line for side in self._pair.sides for line in self._held(side)]

    # -------------------------------------------------------------------------------------------- faults

    def _meet_a_fault(self, plan: Plan) -> None:
        pair = self._pair
        # A heartbeat is only due while somebody waits.
        self._policy.holds_writes = plan.who == "client" or plan.what in ("Heartbeat", "HeartbeatReply")
        pair.submit(RID, PROMPT, options_of(8, ignore_eos=True), decode_first=True)
        for _ in range(3):
            pair.turn()
        if plan.who == "client":
            pair.abort(RID)
            pair.sleep(2 * OPTIONS.heartbeat_s)
        else:
            pair.sleep(2 * OPTIONS.heartbeat_s)
            self._policy.holds_writes = False
            pair.network.release()
            self._sleep_until_ended()
        self._policy.holds_writes = False
        pair.network.release()
        pair.sleep(2 * OPTIONS.heartbeat_s)
        assert self._policy.was_met, f"there was no {plan.what}"

    def _strike_an_end(self, plan: Plan) -> None:
        """Stop one end while a write is in progress."""
        pair = self._pair
        self._policy.holds_writes = True
        pair.submit(RID, PROMPT, options_of(8, ignore_eos=True), decode_first=True)
        pair.settle()
        assert pair.prefill.legs[RID].finished is not None
        pair.sides = tuple(side for side in pair.sides if side is not self._sides[plan.who])
        if plan.fault == "SIGKILL engine":
            self._kill(plan.who)
        pair.sleep(2 * OPTIONS.peer_deadline_s)
        if plan.fault == "SIGSTOP-SIGCONT engine":
            pair.sides = (pair.prefill, pair.decode)
        self._policy.holds_writes = False
        pair.network.release()
        self._sleep_until_ended()

    def _kill(self, who: str) -> None:
        """Prove to the other end that this one's process has ended."""
        module = {"prefill": "transfer.sources", "decode": "transfer.peers"}[who]
        self._patches.enter_context(patch(f"{module}.is_gone", lambda mark: True))
        self._pair.sides = tuple(side for side in self._pair.sides if side is not self._sides[who])

    def _sleep_until_ended(self) -> None:
        """Let time pass until nobody who turns has anything to say any more."""
        begun = self._pair.now
        while self._pair.now < begun + LONGEST_S and not all(side.legs[RID].ended for side in self._pair.sides):
            self._pair.sleep(OPTIONS.heartbeat_s)

    # -------------------------------------------------------------------------------------------- what came of it

    def _outcome(self, plan: Plan) -> Outcome:
        prefill, decode = (side.legs.get(RID) for side in (self._pair.prefill, self._pair.decode))
        if plan.who == "client":
            return Outcome(end="left")
        for leg in (prefill, decode):
            if leg is not None and leg.failed is not None:
                error = leg.failed.error
                return Outcome(
                    end="error", leg=error.leg, stage=error.stage, status=error.status, message=error.message
                )
        if self._pair.decode not in self._pair.sides:
            return Outcome(end="lost")
        if decode is None:
            return Outcome(end="answer")
        assert decode.finished is not None, f"the decode leg has not ended: {decode}"
        tally, answer = Tally(), self._pair.answer(RID)
        assert answer.rows is not None
        assert answer.finish_reason == FinishReason(type="length", length=8)
        self._judge.add(tally, answer.prompt, answer.output_ids, answer.rows)
        return Outcome(end="answer", wrong=str(tally) if tally.wrong else "")

    def _held(self, side: Side) -> list[str]:
        name = "prefill" if side is self._pair.prefill else "decode"
        pages = side.role.stats(0).pages
        counts = {
            "rooms": side.endpoint.num_rooms,
            "rows of the request table": side.engine.capacity.max_running_requests - side.engine.table.num_free,
        }
        named = {key: getattr(pages, key) for key in pages.__struct_fields__}
        return check_pages(name, named, **counts)
