"""Emptying the prefix cache on demand, once nobody holds its pages any more.

Neighbours: the workers that have such a cache, `common.memory.prefix_cache`.
"""

from common.engine.loop import Reply
from common.engine.seats import Seats
from common.memory.prefix_cache import PrefixCache
from common.messages import CacheFlushed


class Flushes:
    """The flushes that have been asked for and not been answered; without a cache there is nothing to empty."""

    def __init__(self, cache: PrefixCache | None, seats: Seats, reply: Reply) -> None:
        self._cache = cache
        self._seats = seats
        self._reply = reply
        self._serials: list[int] = []

    def ask(self, serial: int, num_requests: int) -> None:
        """Take one; it is refused at once while requests run."""
        if num_requests:
            self._reply(CacheFlushed(serial, f"{num_requests} requests are running"))
            return
        self._serials.append(serial)
        self.finish()

    def finish(self) -> None:
        """Empty the cache if nobody holds pages any more, no transfer and no step, and say so; call it when somebody has let go."""
        if self._serials and not self._seats.holders:
            if self._cache is not None:
                self._cache.evict(self._cache.num_pages)
            for serial in self._serials:
                self._reply(CacheFlushed(serial))
            self._serials.clear()
