"""What is remembered of closed rooms, against a plain list of what was buried when."""

import random

import pytest

from transfer import tombstones
from transfer.tombstones import Tombstones

LASTING_S = 5.0


@pytest.mark.parametrize("seed", range(20))
def test_a_room_is_remembered_for_its_time_and_the_oldest_are_forgotten_first(
    monkeypatch: pytest.MonkeyPatch, seed: int
):
    rng, most = random.Random(seed), 6
    monkeypatch.setattr(tombstones, "_MAX_TOMBSTONES", most)
    graves, now = Tombstones(LASTING_S), 0.0
    buried: list[tuple[float, int, str]] = []
    for step in range(300):
        now += rng.choice([0.0, 0.5, 1.0, 3.0])
        graves.expire(now)
        buried = [each for each in buried if each[0] + LASTING_S > now]
        if rng.random() < 0.7:
            room = rng.randrange(10)
            graves.bury(room, f"code {step}", now)
            buried = [*(each for each in buried if each[1] != room), (now, room, f"code {step}")][-most:]
        expected = {room: code for _, room, code in buried}
        assert {room: graves.code_of(room) for room in range(10) if room in graves} == expected
        assert len(graves) == len(expected)
        assert graves.code_of(10) is None
