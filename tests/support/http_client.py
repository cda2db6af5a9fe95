"""A small client of /generate for tests, on purpose without any of the product's code for rows."""

import asyncio
import base64
import json
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import numpy as np

from tests.support.processes import DEADLINE_S


@dataclass
class Reply:
    """One sample's reply."""

    body: dict[str, Any]

    @property
    def meta(self) -> dict[str, Any]:
        return self.body["meta_info"]

    @property
    def output_ids(self) -> list[int]:
        return self.body["output_ids"]

    @property
    def rows(self) -> np.ndarray:
        """`[rows, layers, K]`."""
        return rows_in(self.meta)


def rows_in(fields: dict[str, Any]) -> np.ndarray:
    """The rows `[rows, layers, K]` of whatever holds the `routed_experts` fields: meta_info or sglext."""
    data = fields["routed_experts"]
    raw = base64.b64decode(data, validate=True) if isinstance(data, str) else data
    return np.frombuffer(raw, fields["routed_experts_dtype"]).reshape(fields["routed_experts_shape"])


class Client:
    """Talks to one router or worker; use it as an async context manager."""

    def __init__(self, url: str, *, timeout_s: float = 60) -> None:
        self.url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> "Client":
        self.session = aiohttp.ClientSession(timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def post(self, body: object, *, path: str = "/generate", msgpack: bool = False) -> tuple[int, Any]:
        """POST: status and decoded body."""
        headers = {"Accept": "application/msgpack"} if msgpack else {}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data, headers=headers) as response:
            raw = await response.read()
            if response.content_type == "application/msgpack":
                return response.status, msgspec.msgpack.decode(raw)
            return response.status, json.loads(raw) if raw else None

    async def told(self, path: str, **body: Any) -> dict[str, Any]:
        """POST, as JSON, what must succeed; where an answer says whether it did, it must say so too."""
        async with self.session.post(self.url + path, json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        assert answer.get("success", True) is True, answer
        return dict(answer)

    async def generate(self, *, msgpack: bool = False, **body: Any) -> Reply:
        """One sample that must succeed."""
        status, reply = await self.post(body, msgpack=msgpack)
        assert status == 200, reply
        return Reply(reply)

    async def error(self, body: object) -> dict[str, Any]:
        """A request that must fail: its error's fields and its status."""
        status, reply = await self.post(body)
        assert status != 200, reply
        return {**reply["error"], "status": status}

    async def stream(self, *, path: str = "/generate", **body: Any) -> list[Any]:
        """All events of a stream; the last one must be [DONE] or an error."""
        events: list[Any] = []
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = await response.text()
        for block in text.split("\n\n"):
            if block:
                assert block.startswith("data: ")
                data = block.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
        return events

    async def get(self, path: str) -> tuple[int, Any]:
        """GET: status and body, decoded if it is JSON."""
        async with self.session.get(self.url + path) as response:
            raw = await response.read()
            return response.status, json.loads(raw) if response.content_type == "application/json" else raw.decode()

    async def until_good(self, path: str) -> None:
        """GET until the answer is 200."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.get(path))[0] != 200:
                pass

    async def run_all(
        self, bodies: list[dict[str, Any]], *, concurrency: int = 16, msgpack: bool = True
    ) -> list[Reply]:
        """Run requests, `concurrency` at once; replies in order."""
        gate = asyncio.Semaphore(concurrency)

        async def one(body: dict[str, Any]) -> Reply:
            async with gate:
                return await self.generate(msgpack=msgpack, **body)

        return list(await asyncio.gather(*(one(body) for body in bodies)))

    async def worker_stats(self) -> dict[str, dict[str, Any]]:
        """Each worker's statistics, by role; through the router."""
        _, info = await self.get("/server_info")
        return {worker["worker_type"]: worker["info"]["stats"] for worker in info["workers"]}

    async def quiet_stats(self, deadline_s: float = 20.0) -> dict[str, dict[str, Any]]:
        """Wait until no worker holds anything, then check that the recount of every page is exact."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        while True:
            stats = await self.worker_stats()
            assert asyncio.get_running_loop().time() < deadline, f"something is still held: {stats}"
            if all(
                s["queued_requests"]
                + s["running_requests"]
                + s["rooms"]
                + s["pages"]["running"]
                + s["pages"]["quarantined"]
                == 0
                for s in stats.values()
            ):
                break
        for one in stats.values():
            pages = one["pages"]
            assert pages["unaccounted"] == 0
            assert pages["free"] + pages["cached"] == pages["total"]
        return stats


def expand(rows_moe: np.ndarray, moe_layer_ids: list[int], num_layers: int) -> np.ndarray:
    """What int32 replies look like: all hidden layers, dense ones zero."""
    full = np.zeros((rows_moe.shape[0], num_layers, rows_moe.shape[2]), dtype=np.int32)
    full[:, moe_layer_ids] = rows_moe
    return full
