"""The judge of answers over several versions can find what is wrong, and excuses a tie that no row shows."""

from typing import Any

import numpy as np
import pytest

from tests.support.judge import Tally
from tests.support.reference import Trace
from tests.support.version_judge import VersionJudge

PROMPT, OUTPUT = [1, 2], [3, 3, 3]
SPANS = [[0, 3, "old"], [3, 4, "new"]]


class Scripted:
    """One layer of four experts, of which the first two are chosen; token 3 everywhere. Experts tie in what is hidden, or not."""

    def __init__(self, hidden_gap: float) -> None:
        self._hidden_gap = hidden_gap

    def extend(self, tokens: list[int], cache: Any) -> tuple[Trace, Any]:
        count, gap = len(tokens), 1.0 if len(tokens) != SPANS[1][0] else self._hidden_gap
        logits = np.tile(np.eye(5, dtype=np.float32)[3], (count, 1))
        router_logits = np.tile(np.array([[3.0, 2.0, 2.0 - gap, 0.0]], dtype=np.float32), (count, 1, 1))
        return Trace(logits, router_logits, np.tile(np.array([[[0, 1]]]), (count, 1, 1))), cache


@pytest.mark.parametrize("keeps_kv", [False, True])
@pytest.mark.parametrize("hidden_gap", [0.0, 1.0])
@pytest.mark.parametrize("what", ["token", "row", "nothing"])
def test_what_is_wrong_is_found_unless_a_hidden_tie_excuses_it(what: str, hidden_gap: float, keeps_kv: bool):
    judge = VersionJudge({}, lambda old, new: keeps_kv)
    judge._references = {"old": Scripted(1.0), "new": Scripted(hidden_gap)}  # type: ignore[dict-item]
    rows, output = np.tile(np.array([[[0, 1]]]), (4, 1, 1)), list(OUTPUT)
    if what == "token":
        output[2] = 4
    elif what == "row":
        rows[3] = [[0, 3]]
    tally = Tally()
    judge.add(tally, PROMPT, output, rows, SPANS)
    is_excused = hidden_gap == 0.0 and not keeps_kv
    assert (tally.wrong, tally.ties) == ((what != "nothing") * (not is_excused), (what != "nothing") * is_excused)
