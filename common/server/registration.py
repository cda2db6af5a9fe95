"""A worker's place at a router, which it asks for by itself: it joins, again and again, and leaves at the end.

    POST ROUTER/workers          at the start, and again every third of the lease; soon again if the router did not take it,
                                 and never again if it says that this worker was removed from it
    DELETE ROUTER/workers/{id}   at the end: 200 once the router has no more legs here

Whatever the router says or does not say, the worker serves. Neighbours: `frontend` (runs this), the router's `workers_api`.
"""

import asyncio
import logging
from typing import Final
from urllib.parse import quote
from uuid import uuid4

import aiohttp
import msgspec
from msgspec import Struct

from common.config import RegistrationOptions, ServerOptions, check_url
from common.errors import UsageError
from common.messages import WorkerKind
from common.server.http import bearer

log = logging.getLogger(__name__)

_RENEWALS_A_LEASE: Final = 3
_RETRY_S: Final = 1.0
_CALL_DEADLINE_S: Final = 10.0
_MAX_ANSWER_BYTES: Final = 2**16
_MAX_REASON_CHARS: Final = 300
_WILDCARDS: Final = frozenset(("0.0.0.0", "::", ""))


class _Joined(Struct, frozen=True):
    """What is read of the router's answer."""

    id: str


class Registration:
    """One worker's registration with one router. Raises UsageError for options that cannot be used."""

    def __init__(
        self, kind: WorkerKind, options: RegistrationOptions, server: ServerOptions, bootstrap_port: int | None
    ) -> None:
        self._options = options
        self._url = f"{options.register.rstrip('/')}/workers"
        self._body = {
            "url": own_url(options, server),
            "worker_type": kind,
            "lease_s": options.register_lease_s,
            "instance": uuid4().hex,
            **({} if bootstrap_port is None else {"bootstrap_port": bootstrap_port}),
        }
        self._id: str | None = None
        """What the router calls this worker; None before it has taken it."""
        self._is_removed = False
        self._trouble: str | None = None

    async def run(self) -> None:
        """Join and renew until the router has removed this worker; nothing to do without a router."""
        if not self._options.register:
            return
        period_s = self._options.register_lease_s / _RENEWALS_A_LEASE
        async with self._session(min(period_s, _CALL_DEADLINE_S)) as session:
            while not self._is_removed:
                has_joined = await self._join(session)
                await asyncio.sleep(period_s if has_joined else min(period_s, _RETRY_S))

    async def leave(self, within_s: float) -> None:
        """Have the router send nothing more, and wait until it has nothing left here, but no longer than this.

        `run` must have ended, or it would join again.
        """
        if self._id is None or self._is_removed:
            return
        url = f"{self._url}/{quote(self._id, safe='')}"
        try:
            async with self._session(within_s) as session, session.delete(url) as response:
                log.info("the router at %s lets this worker go: HTTP %d", self._options.register, response.status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("the router at %s does not let this worker go: %r", self._options.register, error)

    def _session(self, timeout_s: float) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        return aiohttp.ClientSession(headers=bearer(self._options.register_key), timeout=timeout)

    async def _join(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.post(self._url, json=self._body) as response:
                answer = await response.content.read(_MAX_ANSWER_BYTES)
            self._is_removed = response.status == 410
            trouble = None if response.status in (200, 201) else f"HTTP {response.status}: {_shortened(answer)}"
            if trouble is None:
                self._id = msgspec.json.decode(answer, type=_Joined).id
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError) as error:
            trouble = repr(error)
        if trouble is None and (self._trouble is not None or response.status == 201):
            log.info("the router at %s has this worker as %s", self._options.register, self._id)
        elif trouble is not None and trouble != self._trouble:
            log.warning(
                "the router at %s has not taken this worker, which asks on: %s", self._options.register, trouble
            )
        self._trouble = trouble
        return trouble is None


def own_url(options: RegistrationOptions, server: ServerOptions) -> str:
    """Say under which URL the router is to find this worker, "" for one that joins none. Raises UsageError."""
    if not options.register:
        return ""
    check_url("--register", options.register)
    if options.advertise_url:
        check_url("--advertise-url", options.advertise_url)
        return options.advertise_url
    if server.host in _WILDCARDS:
        raise UsageError(f"--advertise-url is required: a router cannot find a worker at --host {server.host}")
    return f"http://{f'[{server.host}]' if ':' in server.host else server.host}:{server.port}"


def _shortened(answer: bytes) -> str:
    return answer.decode(errors="replace")[:_MAX_REASON_CHARS]
