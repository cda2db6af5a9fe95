"""A server whose every row and token is the reference's own, and the ways in which a test can spoil them.

For tests of the replay: a right reply, then the same one with a single thing wrong.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from transformers import AutoTokenizer

from deploy.replay.reference import Reference

Reply = dict[str, Any]
Spoil = Callable[[Reply, np.ndarray], np.ndarray]
"""Changes the reply in place, and returns the rows to send, `[R, L, K]`."""


def unspoilt(reply: Reply, rows: np.ndarray) -> np.ndarray:
    """Leave everything as it is."""
    return rows


class ReferenceServer:
    """Answers /generate with transformers' model; `spoil` is applied to the reply numbered `spoil_at` alone."""

    def __init__(self, checkpoint: Path) -> None:
        self._reference = Reference(checkpoint)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._lock = asyncio.Lock()
        self._moe_layer_ids = [0, 2, 3]
        self.spoil: Spoil = unspoilt
        self.spoil_at = 0
        self.num_replies = 0
        self.refuse_with = 200

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.add_routes([web.post("/generate", self.generate), web.get("/server_info", self.server_info)])
        return app

    async def server_info(self, _: web.Request) -> web.Response:
        """As a router does: the model's size is in the account of a worker."""
        return web.json_response({"role": "router", "workers": [{"info": {"model": {"num_experts": 16}}}]})

    async def generate(self, request: web.Request) -> web.Response:
        """One sample's reply as msgpack, or, if the client asks for it, as JSON with base64 of the same bytes."""
        body, accept = await request.json(), request.headers["Accept"]
        encode = {"application/msgpack": msgspec.msgpack.encode, "application/json": msgspec.json.encode}[accept]
        form = "auto" if accept == "application/msgpack" else "int32"
        assert body.get("routed_experts_dtype", form) == form
        if self.refuse_with != 200:
            return web.json_response({"error": {"message": "no such luck"}}, status=self.refuse_with)
        async with self._lock:
            reply = await asyncio.to_thread(self._reply, body)
        return web.Response(body=encode(reply), content_type=accept)

    def _reply(self, body: dict[str, Any]) -> Reply:
        prompt = body["input_ids"] if "input_ids" in body else self._tokenizer(body["text"]).input_ids
        output = self._reference.generate(prompt, body["sampling_params"]["max_new_tokens"])
        meta = {
            "finish_reason": {"type": "length", "length": len(output)},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
        }
        reply: Reply = {"text": self._tokenizer.decode(output), "output_ids": output, "meta_info": meta}
        if body.get("return_routed_experts"):
            rows = self._reference.trace([*prompt, *output]).expert_ids[:-1]
            if self.num_replies == self.spoil_at:
                rows = self.spoil(reply, rows.copy())
            meta |= {
                "routed_experts": rows.astype("<u1").tobytes(),
                "routed_experts_start_len": 0,
                "routed_experts_shape": list(rows.shape),
                "routed_experts_dtype": "uint8",
                "routed_experts_layer_ids": self._moe_layer_ids,
                "routed_experts_moe_layer_ids": self._moe_layer_ids,
            }
        self.num_replies += 1
        return reply
