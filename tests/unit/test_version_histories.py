"""Which weights have computed which row, over random histories: chunks, changes of weights, tokens, swaps, aborts.

The recount are the rows themselves: `tests.support.stamped`.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from common.messages import Abort, Finished, FinishNow, RequestOptions, RowBlock, StopAt
from tests.support.aggregated import InProcessAggregated
from tests.support.in_process_pair import InProcessPair, options_of
from tests.support.recorder import Leg
from tests.support.stamped import by_position, change_weights, check_stamps, stamping

PAGE_SIZE = 4
SMALL: dict[str, Any] = {
    "page_size": PAGE_SIZE,
    "chunk_tokens": 7,
    "pool_tokens": 80,
    "max_running": 6,
    "verify_rows": False,
}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("plain")


def prompt_of(num_shared: int, num_own: int, seed: int) -> list[int]:
    """Prompts that begin alike, so that they are found in the cache."""
    return [*range(num_shared), *((seed + i) % 50 + 40 for i in range(num_own))]


@dataclass
class Asked:
    prompt: list[int]
    options: RequestOptions


class PairUnderTest:
    """Both legs over the loopback; each side has its own weights."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.pair = InProcessPair(checkpoint, parts=stamping(), **SMALL | options)
        self.asked: dict[str, Asked] = {}
        for side in self.pair.sides:
            side.engine.weight_version = "v0"

    def change(self, which: int, number: int) -> None:
        for index, side in enumerate((self.pair.prefill, self.pair.decode)):
            if which in (index, 2):
                change_weights(side.loop, number)

    def submit(self, rid: str, prompt: list[int], options: RequestOptions) -> None:
        self.asked[rid] = Asked(prompt, options)
        self.pair.submit(rid, prompt, options, decode_first=len(self.asked) % 2 == 0)

    def tell(self, message: Any) -> None:
        for side in self.pair.sides:
            side.role.handle(message)

    def turn(self) -> bool:
        return self.pair.turn()

    def settle(self) -> None:
        self.pair.settle()
        self.pair.check_pages()

    def legs(self) -> list[Leg]:
        return [leg for side in (self.pair.prefill, self.pair.decode) for leg in side.legs.values()]

    def num_swaps(self) -> int:
        return self.pair.decode.role.stats(0).swaps

    def check(self, rid: str) -> None:
        asked = self.asked[rid]
        prefill, decode = self.pair.prefill.legs[rid], self.pair.decode.legs[rid]
        num_prompt = len(asked.prompt)
        failures = [leg.failed.error for leg in (prefill, decode) if leg.failed is not None]
        if asked.options.allow_mixed_versions:
            assert failures == []
        for error in failures:
            assert error.code == "mixed_versions" or error.leg == "decode", error
        for finished, block in ended(prefill):
            check_leg(finished, block, 0, num_prompt if finished.token_ids else 0)
        for finished, block in ended(decode):
            stop = num_prompt + len(finished.token_ids) - 1
            check_leg(finished, block, num_prompt, max(num_prompt, stop))
            if prefill.finished is not None and prefill.finished.token_ids:
                # What the router joins.
                versions = {*by_position(prefill.finished.weight_versions).values()}
                versions |= {*by_position(finished.weight_versions).values()}
                assert asked.options.allow_mixed_versions or len(versions) == 1


class AggregatedUnderTest:
    """One engine for both."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.whole = InProcessAggregated(checkpoint, parts=stamping(), **SMALL | options)
        self.asked: dict[str, Asked] = {}
        self.whole.engine.weight_version = "v0"

    def change(self, which: int, number: int) -> None:
        change_weights(self.whole.loop, number)

    def submit(self, rid: str, prompt: list[int], options: RequestOptions) -> None:
        self.asked[rid] = Asked(prompt, options)
        self.whole.submit(rid, prompt, options)

    def tell(self, message: Any) -> None:
        self.whole.role.handle(message)

    def turn(self) -> bool:
        return self.whole.turn()

    def settle(self) -> None:
        self.whole.settle()
        self.whole.check_pages()

    def legs(self) -> list[Leg]:
        return list(self.whole.legs.values())

    def num_swaps(self) -> int:
        return self.whole.role.stats(0).swaps

    def check(self, rid: str) -> None:
        asked, leg = self.asked[rid], self.whole.legs[rid]
        if leg.failed is not None:
            error = leg.failed.error
            assert (error.code, error.status, error.leg, error.stage) == ("mixed_versions", 503, None, "versions")
            assert not asked.options.allow_mixed_versions
        for finished, block in ended(leg):
            is_whole = finished.token_ids or finished.finish_reason.type != "abort"
            check_leg(finished, block, 0, len(asked.prompt) + len(finished.token_ids) - 1 if is_whole else 0)
            versions = set(by_position(finished.weight_versions).values())
            assert asked.options.allow_mixed_versions or len(versions) <= 1


def ended(leg: Leg) -> list[tuple[Finished, RowBlock | None]]:
    return [(finished, leg.blocks.get(index)) for index, finished in leg.ends.items()]


def check_leg(finished: Finished, block: RowBlock | None, start: int, stop: int) -> None:
    assert list(by_position(finished.weight_versions)) == list(range(start, stop))
    if block is not None:
        check_stamps(block, finished.weight_versions)


def play(under_test: PairUnderTest | AggregatedUnderTest, rng: random.Random) -> Counter[str]:
    """Play a random history to its end, and check every answer; counts what has happened."""
    for number in range(1, 90):
        rid = f"r{rng.randrange(max(1, len(under_test.asked)))}"
        what = rng.choices(["submit", "turn", "change", "abort", "finish", "stop"], [30, 60, 6, 3, 6, 6])[0]
        match what:
            case "submit":
                prompt = prompt_of(rng.choice([0, 9, 16]), rng.randint(1, 14), number)
                options = options_of(
                    rng.randint(1, 36),
                    n=rng.choice([1, 1, 2, 3]),
                    rows=rng.random() < 0.9,
                    start_len=rng.randrange(len(prompt) + 1),
                    ignore_eos=True,
                )
                options = replace(options, allow_mixed_versions=rng.random() < 0.6)
                under_test.submit(f"r{len(under_test.asked)}", prompt, options)
            case "change":
                under_test.change(rng.randrange(3), number)
            case "turn":
                for _ in range(rng.randint(1, 4)):
                    under_test.turn()
            case _ if under_test.asked:
                stop = StopAt(rid=rid, index=0, num_tokens=rng.randint(1, 4), matched="x")
                under_test.tell({"abort": Abort(rid), "finish": FinishNow(rid), "stop": stop}[what])
    under_test.settle()
    for rid in under_test.asked:
        under_test.check(rid)
    ends = [finished for leg in under_test.legs() for finished in leg.ends.values()]
    return Counter(
        rows=sum(finished.rows is not None for finished in ends),
        mixed=sum(len(finished.weight_versions) > 1 for finished in ends),
        cached=sum(finished.cached_tokens > 0 for finished in ends),
        failed=sum(leg.failed is not None for leg in under_test.legs()),
        swaps=under_test.num_swaps(),
    )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("system", [PairUnderTest, AggregatedUnderTest])
def test_every_row_has_the_version_of_its_step(
    checkpoint: Path, system: type[PairUnderTest | AggregatedUnderTest], overlap: bool
):
    tally = sum((play(system(checkpoint, overlap=overlap), random.Random(seed)) for seed in range(6)), Counter[str]())
    assert min(tally[what] for what in ("rows", "mixed", "cached", "failed", "swaps")) > 0, tally
