"""Weight versions in the router's answers, and what it does when there are several; over stub workers with real sockets."""

from typing import Any

import aiohttp
import msgspec
import pytest

from common.protocol.replies import MSGPACK
from router.config import RouterConfig, RouterOptions
from tests.support import stub_workers as stubs
from tests.support.asking import PROMPT, P, ask, blamed, body, check_answer, check_nothing_is_left, metrics_of
from tests.support.stub_workers import Stack, stack

ONE = [[0, P + 3, "w1"]]
TWO = [[0, P, "w1"], [P, P + 3, "w2"]]
# One failure is enough to see whom the router blames.
BLAMING: dict[str, Any] = {"max_retries": 2, "breaker_failures": 1, "breaker_pause_s": 3600.0}


def change_decode(running: Stack) -> None:
    running.decode.weight_version = "w2"


def versions_of(meta: dict[str, Any]) -> tuple[str, list[list[Any]]]:
    return meta["weight_version"], meta["weight_versions"]


# ------------------------------------------------------------------------------------------------ what answers say


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rows", [False, True])
async def test_an_answer_names_the_version_of_each_position(stream: bool, rows: bool):
    async with stack(router={"allow_mixed_versions": True}) as running:
        for expected in (("w1", ONE), ("w2", TWO)):
            status, reply = await ask(running, body(stream=stream, return_routed_experts=rows))
            assert (status, versions_of(reply["meta_info"])) == (200, expected)
            change_decode(running)


async def test_the_same_in_msgpack_and_for_every_sample():
    async with stack() as running:
        headers = {"Accept": MSGPACK}
        async with running.client.post("/generate", json=body(sampling_params={"n": 2}), headers=headers) as response:
            replies = msgspec.msgpack.decode(await response.read())
        assert [versions_of(reply["meta_info"]) for reply in replies] == [("w1", ONE)] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_the_openai_routes_say_it_too(stream: bool):
    request = {"prompt": PROMPT, "max_tokens": 4, "seed": 100, "stream": stream, "return_routed_experts": True}

    async def asked(running: Stack, **fields: Any) -> Any:
        async with running.client.post("/v1/completions", json=request | fields) as response:
            if not stream:
                return await response.json()
            events = [item.removeprefix("data: ") for item in (await response.text()).split("\n\n") if item]
            return msgspec.json.decode(events[-2] if events[-1] == "[DONE]" else events[-1])

    async with stack() as running:
        assert versions_of((await asked(running))["sglext"]) == ("w1", ONE)
        change_decode(running)
        assert (await asked(running))["error"]["code"] == "mixed_versions"
        mixed = await asked(running, allow_mixed_versions=True, return_meta_info=True)
        assert versions_of(mixed["choices"][0]["meta_info"]) == ("w2", TWO)


@pytest.mark.parametrize("max_new_tokens", [0, 1])
async def test_an_answer_without_decode_positions_has_the_prompts(max_new_tokens: int):
    async with stack() as running:
        sampling = {"max_new_tokens": max_new_tokens}
        status, reply = await ask(running, body(sampling_params=sampling))
        expected = ("w1", [[0, P - 1 + max_new_tokens, "w1"]])
        assert (status, versions_of(reply["meta_info"])) == (200, expected)


# ------------------------------------------------------------------------------------------------ who may mix


@pytest.mark.parametrize(
    ("default", "asked", "is_allowed"),
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False)],
)
async def test_the_request_says_whether_versions_may_be_mixed_else_the_router(
    default: bool, asked: bool | None, is_allowed: bool
):
    async with stack(router={"allow_mixed_versions": default}) as running:
        change_decode(running)
        status, reply = await ask(running, body(allow_mixed_versions=asked))
        assert status == (200 if is_allowed else 503), reply
        for stub in (running.prefill, running.decode):
            assert [sample.options.allow_mixed_versions for sample in stub.samples] == [is_allowed]


@pytest.mark.parametrize("rows", [False, True])
async def test_mixed_versions_are_nobodys_fault(rows: bool):
    async with stack(router=BLAMING) as running:
        change_decode(running)
        status, reply = await ask(running, body(return_routed_experts=rows))
        error = reply["error"]
        assert (status, error["code"], error["leg"], error["stage"]) == (503, "mixed_versions", None, "versions")
        assert "'w1', 'w2' (3 attempts)" in error["message"]
        assert len(running.prefill.samples) == len(running.decode.samples) == 3
        assert await blamed(running) == []
        assert 'tandem_router_retries_total{leg="none",stage="versions"} 2.0' in await metrics_of(running)
        await check_nothing_is_left(running)


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_worker_that_may_not_go_on_is_asked_again_and_not_blamed(leg: str):
    """Whichever leg says so, and whomever its transfer's end names."""
    for status, named in ((503, None), (502, "prefill")):

        async def changed_meanwhile(
            stub: Any, request: Any, sample: Any, status: int = status, named: Any = named
        ) -> Any:
            behaviour = stubs.refuse(status, "the weights", "mixed_versions", leg=named, stage="transfer")
            return await (stubs.good if len(stub.samples) > 1 else behaviour)(stub, request, sample)

        async with stack(**{leg: changed_meanwhile}, router=BLAMING) as running:  # type: ignore[arg-type]
            check_answer(*await ask(running, body()))
            assert await blamed(running) == []


async def test_an_aggregated_worker_that_may_not_go_on_is_not_blamed():
    async with stack(decode=stubs.refuse(503, "the weights", "mixed_versions", stage="versions")) as running:
        options = RouterOptions(worker=(running.decode.url,), **BLAMING)
        app = await stubs.create_app(RouterConfig(router=options))
        async with stubs.serving(app) as url, aiohttp.ClientSession(url) as running.client:
            status, reply = await ask(running, body())
            assert (status, reply["error"]["code"], reply["error"]["leg"]) == (503, "mixed_versions", None)
            assert len(running.decode.samples) == 3
            assert await blamed(running) == []


async def test_a_stream_that_has_begun_ends_with_the_error():
    async with stack(router=BLAMING) as running:
        change_decode(running)
        status, reply = await ask(running, body(stream=True))
        assert (status, reply["error"]["code"], reply["error"]["stage"]) == (200, "mixed_versions", "versions")
        assert len(running.decode.samples) == 1


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_leg_that_does_not_say_its_versions_has_failed(leg: str):
    async with stack() as running:
        getattr(running, leg).drop_versions = True
        status, reply = await ask(running, body(return_routed_experts=False))
    error = reply["error"]
    assert (status, error["leg"], error["stage"]) == (502, leg, "merge")
    assert "weight versions do not cover its positions" in error["message"]


async def test_rows_that_name_other_versions_than_their_leg_are_refused():
    async def two_stories(stub: Any, request: Any, sample: Any) -> Any:
        reply = stub.reply(sample, binary=True)
        reply["meta_info"]["weight_versions"] = [[P, P + 3, "w1"]]
        return aiohttp.web.Response(body=msgspec.msgpack.encode(reply), content_type=MSGPACK)

    async with stack(decode=two_stories, router={"max_retries": 2}) as running:
        check_answer(*await ask(running, body()))
        change_decode(running)
        status, reply = await ask(running, body(allow_mixed_versions=True))
        assert (status, reply["error"]["code"]) == (500, "routed_experts_mismatch")
        assert len(running.decode.samples) == 2
