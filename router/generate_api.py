"""POST /generate: parsed here, run by `resume`, one call a prompt, and answered whole or as a stream.

Neighbours: `replies` (what goes out), `streaming`, `intake` (counts the requests).
"""

import asyncio

from aiohttp import web

from common.protocol.generate import parse_generate
from common.protocol.replies import wants_msgpack
from common.server.admission import Admission
from common.server.bodies import send_body
from common.server.http import together
from router.intake import Times
from router.replies import GenerateEvents, generate_body
from router.resume import Resumed
from router.routing_key import keyed
from router.streaming import send_stream


class GenerateApi:
    """POST /generate."""

    def __init__(self, prompts: Resumed, admission: Admission, *, allow_mixed_versions: bool) -> None:
        self._prompts = prompts
        self._admission = admission
        self._allow_mixed_versions = allow_mixed_versions

    async def generate(self, request: web.Request, times: Times) -> tuple[web.StreamResponse, int]:
        """Answer one request."""
        call = parse_generate(await request.read(), allow_mixed_versions=self._allow_mixed_versions)
        call = keyed(call, request.headers)
        as_msgpack = wants_msgpack(request.headers.get("Accept"), stream=call.stream)
        with self._admission.admit(call.num_answers):
            if call.stream:
                writer = GenerateEvents(is_list=call.is_list)
                return await send_stream(request, call.samples, self._prompts, writer, times)
            running = [
                self._prompts.answer(sample, deadline=times.deadline, as_base64=not as_msgpack)
                for sample in call.samples
            ]
            answers = await together(running)
            body = generate_body(
                [(sample, answer) for sample, mine in zip(call.samples, answers, strict=True) for answer in mine],
                is_list=call.is_list,
                as_msgpack=as_msgpack,
                e2e_latency_s=asyncio.get_running_loop().time() - times.started,
            )
            return await send_body(request, body, binary=as_msgpack), 200
