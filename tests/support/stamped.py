"""Engines whose rows say under which weights they were computed: a recount of versions that knows none of the bookkeeping.

The stamp takes the place of each row's first expert id, so it goes wherever the row goes: into the host cache, to other samples,
through swapping, gathering and merging. Such rows are no router's, so they must not be verified.
"""

import numpy as np
import torch

from common.engine.build import EngineParts
from common.engine.fake import RacingDevice, RacingEngine
from common.engine.loop import Loop
from common.engine.step import Launched
from common.messages import RowBlock, VersionSpan
from common.orders import Done, Order, SetWeightVersion
from common.routed_experts.capture import RoutedExpertsCapturer
from common.routed_experts.codec import view
from common.scheduling.step_plan import StepPlan


class StampingCapturer(RoutedExpertsCapturer):
    """Puts its stamp into every row that it hands out."""

    stamp = 0

    def take(self, num_tokens: int) -> torch.Tensor:
        """Copy the rows, and stamp them."""
        rows = super().take(num_tokens)
        rows[:, 0, 0] = self.stamp
        return rows


class StampingEngine(RacingEngine):
    """Stamps a step's rows with the number in the name of the weights that it is launched under."""

    def launch(self, plan: StepPlan) -> Launched:
        """Launch under the present weights."""
        assert isinstance(self._capturer, StampingCapturer)
        self._capturer.stamp = int(self.weight_version[1:])
        return super().launch(plan)


def stamping() -> EngineParts:
    """The parts of such an engine."""
    return EngineParts(device=RacingDevice(), engine=StampingEngine, capturer=StampingCapturer)


def order(loop: Loop, *orders: Order) -> None:
    """Have orders carried out, as the frontend does."""
    answers: list[Done] = []
    for one in orders:
        loop.order(one, answers.append)
    loop.turn()
    assert [answer.error for answer in answers] == [None] * len(orders)


def change_weights(loop: Loop, number: int) -> None:
    """Go on under version `v<number>`."""
    order(loop, SetWeightVersion(0, f"v{number}"))


def by_position(spans: tuple[VersionSpan, ...]) -> dict[int, str]:
    """The version of each position."""
    pairs = [(position, span.weight_version) for span in spans for position in range(span.start, span.stop)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def check_stamps(block: RowBlock, spans: tuple[VersionSpan, ...]) -> np.ndarray:
    """Every row's version, by the answer's spans and by the block's own, is the stamp of the step that has computed it."""
    stamps = view(block)[:, 0, 0]
    positions = range(block.header.start, block.header.stop)
    expected = {position: f"v{stamp}" for position, stamp in zip(positions, stamps, strict=True)}
    assert by_position(block.header.weight_versions) == expected
    assert {p: version for p, version in by_position(spans).items() if p in positions} == expected
    return stamps
