"""Rooms: which numbers they may be, and where on a prefill worker they lead."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import MAX_ROOM, new_room
from common.ranks import Ranks


@given(groups=st.integers(1, 64), data=st.data())
def test_a_room_leads_to_its_group(groups: int, data: st.DataObject):
    group = data.draw(st.integers(0, groups - 1))
    room = new_room(group, groups)
    assert 1 <= room <= MAX_ROOM
    assert Ranks(tp=groups, dp=groups).group_of_room(room) == group


@pytest.mark.parametrize(("group", "groups"), [(0, 1), (0, 3), (2, 3), (0, 8), (7, 8)])
def test_the_ends_of_the_range(monkeypatch: pytest.MonkeyPatch, group: int, groups: int):
    """Whatever is drawn: never 0, never more than 63 bits, and both ends can come."""
    monkeypatch.setattr(secrets, "randbelow", lambda count: 0)
    assert new_room(group, groups) == next(room for room in range(1, 100) if room % groups == group)
    monkeypatch.setattr(secrets, "randbelow", lambda count: count - 1)
    assert new_room(group, groups) == next(room for room in range(MAX_ROOM, 0, -1) if room % groups == group)


def test_rooms_are_random():
    assert len({new_room(1, 4) for _ in range(100)}) == 100
