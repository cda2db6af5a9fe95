"""A stand-in for the router that answers /generate in all forms, rightly but for what a test scripts.

Its model: the token after position i is a function of i and the seed, and a row one of position and token. So the answer to any
request is known, whatever was asked before it.
"""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

MOE_LAYERS, NUM_LAYERS, K = (0, 2), 3, 2
MSGPACK = "application/msgpack"

Move = Callable[[web.Request], Awaitable[web.StreamResponse]]
"""What becomes of one request instead of an answer."""
Spoil = Callable[[dict[str, Any]], object]


def token_at(position: int, seed: int) -> int:
    """The token that is drawn for a position."""
    return (position * 7 + seed) % 100


def rows_of(token_ids: list[int], start: int = 0) -> np.ndarray:
    """The rows `[P+G-1-start, 2, K]` of a sequence, as its MoE layers have them."""
    positions = np.arange(len(token_ids) - 1).reshape(-1, 1, 1)
    tokens = np.array(token_ids[:-1], dtype=np.int64).reshape(-1, 1, 1)
    layers = np.array([[0, 1], [2, 3]])
    return ((positions * 3 + tokens + layers) % 200)[start:]


def spread(rows: np.ndarray) -> np.ndarray:
    """All layers, the dense one zero."""
    full = np.zeros((len(rows), NUM_LAYERS, K), dtype=np.int32)
    full[:, list(MOE_LAYERS)] = rows
    return full


def refuse(status: int, **headers: str) -> Move:
    """Answer with an error body, and with the headers, `_` in whose names is `-`."""

    async def move(request: web.Request) -> web.StreamResponse:
        error = {"message": "not now", "code": "busy", "leg": "decode", "stage": "engine", "rid": "r", "type": "t"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response({"error": error}, status=status, headers=named)

    return move


def say(body: object, *, status: int = 200) -> Move:
    """Answer with this: bytes as they are, else as JSON."""

    async def move(request: web.Request) -> web.StreamResponse:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return web.Response(body=data, status=status, content_type="application/json")

    return move


async def hang_up(request: web.Request) -> web.StreamResponse:
    """Close the connection without a word."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hang_up_midway(request: web.Request) -> web.StreamResponse:
    """Close the connection in the middle of the body."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    response.content_type = MSGPACK
    await response.prepare(request)
    await response.write(b"\x83")
    return await hang_up(request)


async def say_nothing(request: web.Request) -> web.StreamResponse:
    """Answer when the client has gone."""
    await asyncio.Event().wait()
    return web.Response()


class StubGenerator:
    """Answers; `asked` are the bodies of /generate, `headers` theirs, `told` the other calls as (path, body)."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        """For the next requests, in order; those that come then are answered."""
        self.cuts: list[int] = []
        """After how many tokens the next answers are ended, as by somebody else."""
        self.versions: list[tuple[int, int, str]] = [(0, 5, "old"), (5, 10**6, "new")]
        """Of the positions of the next answers."""
        self.spoil: Spoil = lambda reply: None
        self.event_spoil: Callable[[list[bytes]], list[bytes]] = lambda events: events
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.told: list[tuple[str, Any]] = []

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.add_routes([web.post("/generate", self.generate), web.route("*", "/{path:.*}", self.tell)])
        return app

    async def tell(self, request: web.Request) -> web.StreamResponse:
        self.told.append((request.path, await request.json() if request.can_read_body else None))
        if self.moves:
            return await self.moves.pop(0)(request)
        return web.json_response({"workers": [{"id": "w0"}]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        if self.moves:
            return await self.moves.pop(0)(request)
        n = body["sampling_params"].get("n", 1)
        as_bytes = request.headers["Accept"] == MSGPACK
        replies = [self._reply(body, index, as_bytes=as_bytes) for index in range(n)]
        if body.get("stream"):
            return await self._stream(request, replies)
        whole = replies if n > 1 else replies[0]
        if as_bytes:
            return web.Response(body=msgspec.msgpack.encode(whole), content_type=MSGPACK)
        return web.json_response(whole)

    async def _stream(self, request: web.Request, replies: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        events: list[dict[str, Any]] = []
        for index, reply in enumerate(replies):
            begun = {"text": "a", "output_ids": reply["output_ids"][:1], "meta_info": {"finish_reason": None}}
            events += [{"index": index, **begun}, {"index": index, **reply}]
        lines = [b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]
        data = b"".join(self.event_spoil(lines))
        # In pieces that end anywhere.
        for lo in range(0, len(data), 50):
            await response.write(data[lo : lo + 50])
        return response

    def _reply(self, body: dict[str, Any], index: int, *, as_bytes: bool) -> dict[str, Any]:
        prompt, sampling = body.get("input_ids", [1, 2, 3]), body["sampling_params"]
        seed, num_tokens = sampling["sampling_seed"] + index, sampling["max_new_tokens"]
        is_cut = bool(self.cuts)
        num_tokens = min(self.cuts.pop(0), num_tokens) if is_cut else num_tokens
        output = [token_at(len(prompt) + i, seed) for i in range(num_tokens)]
        reason = {"type": "abort", "cause": "requested"} if is_cut else {"type": "length", "length": num_tokens}
        stop = len(prompt) + num_tokens - 1
        meta = {
            "id": "r",
            "finish_reason": reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": num_tokens,
            "weight_version": "new",
            "weight_versions": [[lo, min(hi, stop), name] for lo, hi, name in self.versions if lo < stop],
        }
        all_output = [*prompt[len(prompt) - body.get("resumed_tokens", 0) :], *output]
        reply = {"text": " ".join(map(str, all_output)), "output_ids": output, "meta_info": meta}
        if body.get("return_routed_experts") and not (is_cut and num_tokens == 0):
            meta |= self._rows(body, [*prompt, *output], as_bytes=as_bytes)
        self.spoil(reply)
        return reply

    @staticmethod
    def _rows(body: dict[str, Any], token_ids: list[int], *, as_bytes: bool) -> dict[str, Any]:
        start, dtype = body["routed_experts_start_len"], "uint8"
        rows, layers = rows_of(token_ids, start), list(MOE_LAYERS)
        if body["routed_experts_dtype"] == "int32":
            rows, layers, dtype = spread(rows), list(range(NUM_LAYERS)), "int32"
        data = rows.astype(dtype).tobytes()
        return {
            "routed_experts": data if as_bytes else base64.b64encode(data).decode(),
            "routed_experts_start_len": start,
            "routed_experts_shape": list(rows.shape),
            "routed_experts_dtype": dtype,
            "routed_experts_layer_ids": layers,
            "routed_experts_moe_layer_ids": list(MOE_LAYERS),
        }
