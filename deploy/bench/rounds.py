"""Rounds: several ways to do a thing, measured in turn, so that whatever else the machine does falls on all of them.

It knows neither what is measured nor in which unit. Neighbour: `figures`.
"""

import gc
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


def alternate(measures: Mapping[Key, Callable[[], float]], rounds: int, *, warm_up: int = 1) -> dict[Key, list[float]]:
    """Call every measure once a round, `rounds` times after `warm_up` rounds that do not count; each goes first in turn."""
    values: dict[Key, list[float]] = {key: [] for key in measures}
    keys = list(measures)
    for number in range(rounds + warm_up):
        first = number % len(keys)
        # What one leaves behind, in caches or connections, must not always favour the same next one.
        for key in keys[first:] + keys[:first]:
            value = measures[key]()
            if number >= warm_up:
                values[key].append(value)
    return values


def seconds_of(function: Callable[[], object]) -> float:
    """Time one call; the garbage collector, which would scan what other benchmarks have loaded, waits."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        result = function()
        elapsed = time.perf_counter() - began
    finally:
        if was_enabled:
            gc.enable()
    # Not before: giving back the memory of a large result is not a part of making it.
    del result
    return elapsed
