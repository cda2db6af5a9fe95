"""What nobody should send: JSON values, bodies and bytes for fuzz tests, the same in every run."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

STABLE = settings(
    derandomize=True, deadline=None, max_examples=200, database=None, suppress_health_check=list(HealthCheck)
)


class Raw(str):
    """JSON text that `dump` takes as it is."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may come twice."""


EXTREMES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.0,
    1.5,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    10**400,
    Raw("9" * 5000),
    Raw("1e308"),
    Raw("1e999"),
    Raw("-0.0"),
    Raw("NaN"),
    Raw("-Infinity"),
    "",
    "\0",
    "\ud800",
    "\udc00\ud800",
    "9",
    "é" * 600,
    Raw('"\\u12"'),
    [],
    [[]],
    [None],
    [True, 1],
    [1, [2, [3]]],
    {},
    {"": ""},
    {"type": "text"},
    Raw("[" * 60 + "]" * 60),
    Raw("[" * 900 + "]" * 900),
    Raw("[" * 10**5),
    Raw('{"a":' * 400 + "1" + "}" * 400),
    Raw('{"a": 1, "a": []}'),
]

_SCALARS = st.sampled_from(EXTREMES) | st.integers() | st.floats() | st.text(max_size=5) | st.booleans()
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def dump(value: Any) -> str:
    """Write JSON, and what is nearly JSON."""
    match value:
        case Raw():
            return value
        case Pairs():
            return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value) + "}"
        case dict():
            return dump(Pairs(value.items()))
        case list() | tuple():
            return "[" + ",".join(map(dump, value)) + "]"
        case _:
            return json.dumps(value)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced in a nested value, the value itself left out."""
    inside: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    return [place for key, item in inside for place in ((*at, key), *places(item, (*at, key)))]


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a nested value with something else at one place; the value itself if there is no such place any more."""
    if not place:
        return new
    key, *rest = place
    if isinstance(value, dict) and key in value:
        return {**value, key: replaced(value[key], tuple(rest), new)}
    if isinstance(value, list) and key in range(len(value)):
        return [*value[:key], replaced(value[key], tuple(rest), new), *value[key + 1 :]]
    return value


@st.composite
def mutated(draw: st.DrawFn, good: Sequence[Any], values: st.SearchStrategy[Any] = VALUES) -> Any:
    """One of the good values, with something else at one to three places."""
    value = draw(st.sampled_from(good))
    for place in draw(st.lists(st.sampled_from(places(value)), min_size=1, max_size=3)):
        value = replaced(value, place, draw(values))
    return value


@st.composite
def damaged(draw: st.DrawFn, good: Sequence[bytes]) -> bytes:
    """One of the good messages, with bytes changed, left out, doubled or put in; or bytes of any kind."""
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=3) | st.sampled_from([b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1"]))
        data[at : at + draw(st.integers(0, 4))] = new
    return draw(st.just(bytes(data)) | st.just(bytes(data)) | st.binary(max_size=40))
