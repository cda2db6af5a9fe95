"""A conversation by deltas against a stand-in: what is sent, what is held, and that nothing goes wrong in silence."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestServer

from common.messages import VersionSpan
from deploy.answers import MalformedReplyError, MalformedRowsError
from deploy.client import TandemClient
from deploy.connection import NO_RETRIES, ServerError
from deploy.session import Session
from tests.support.stub_generator import MOE_LAYERS, StubGenerator, refuse, rows_of

THREE: dict[str, Any] = {"max_new_tokens": 3}


@pytest.fixture
async def server() -> StubGenerator:
    return StubGenerator()


@pytest.fixture
async def client(server: StubGenerator) -> AsyncIterator[TandemClient]:
    async with (
        TestServer(server.app()) as running,
        TandemClient(str(running.make_url("/")), deadline_s=30, retries=NO_RETRIES) as opened,
    ):
        yield opened


def is_whole(session: Session, num_tokens: int) -> None:
    assert len(session.token_ids) == num_tokens
    assert session.num_rows == num_tokens - 1
    assert np.array_equal(session.rows, rows_of(session.token_ids))
    assert session.layer_ids == MOE_LAYERS


async def test_turns_send_everything_and_get_what_is_new(client: TandemClient, server: StubGenerator) -> None:
    session = client.session("talk")
    for turn in range(4):
        reply = await session.turn([turn, 50], sampling_params=THREE)
        assert session.token_ids[-3:] == reply.output_ids
        if turn == 2:
            is_whole(session, 15)
    is_whole(session, 20)
    assert [asked["routed_experts_start_len"] for asked in server.asked] == [0, 4, 9, 14]
    assert [len(asked["input_ids"]) for asked in server.asked] == [2, 7, 12, 17]
    assert [headers["x-session-id"] for headers in server.headers] == ["talk"] * 4
    assert session.weight_versions == (VersionSpan(0, 5, "old"), VersionSpan(5, 19, "new"))


async def test_rows_keep_the_version_that_has_computed_them(client: TandemClient, server: StubGenerator) -> None:
    session = client.session()
    await session.turn([7, 8], sampling_params=THREE)
    server.versions = [(0, 10**6, "newer")]
    await session.turn([9], sampling_params=THREE)
    assert session.weight_versions == (VersionSpan(0, 4, "old"), VersionSpan(4, 8, "newer"))


async def test_bytes_are_counted_once(client: TandemClient, server: StubGenerator) -> None:
    session = client.session()
    whole = await session.turn([1], sampling_params=THREE)
    server.cuts = [2]
    partial = await session.turn([2], sampling_params=THREE)
    assert session.bytes_received == whole.num_bytes + partial.num_bytes
    resumed = await session.resume()
    assert session.bytes_received == whole.num_bytes + resumed.num_bytes
    assert resumed.num_bytes > partial.num_bytes > 0


@pytest.mark.parametrize("cuts", [[2], [0], [1, 1], [2, 0], [0, 2]])
@pytest.mark.parametrize("looks", [False, True])
async def test_a_turn_that_was_ended_goes_on(
    client: TandemClient, server: StubGenerator, cuts: list[int], looks: bool
) -> None:
    session = client.session()
    await session.turn([7, 8], sampling_params=THREE)
    server.cuts = list(cuts)
    reply = await session.turn([9, 10], sampling_params=THREE)
    for _ in cuts:
        assert reply.is_partial
        if looks:
            is_whole(session, 5 + (2 + len(reply.output_ids) if reply.output_ids else 0))
        reply = await session.resume()
    is_whole(session, 10)
    assert session.token_ids[5:] == [9, 10, *reply.output_ids]
    await session.turn([1], sampling_params=THREE)
    is_whole(session, 14)


async def test_another_turn_may_follow_one_that_was_ended(client: TandemClient, server: StubGenerator) -> None:
    session = client.session()
    server.cuts = [1]
    await session.turn([7, 8], sampling_params=THREE)
    await session.turn([], sampling_params=THREE)
    is_whole(session, 6)


async def test_a_scored_prompt_is_a_turn_too(client: TandemClient) -> None:
    session = client.session()
    await session.turn([7, 8, 9], sampling_params={"max_new_tokens": 0})
    is_whole(session, 3)


async def test_a_turn_that_fails_changes_nothing(client: TandemClient, server: StubGenerator) -> None:
    session = client.session()
    await session.turn([7, 8], sampling_params=THREE)
    server.moves = [refuse(500)]
    with pytest.raises(ServerError):
        await session.turn([9], sampling_params=THREE)
    server.spoil = lambda reply: reply["meta_info"].update(routed_experts_start_len=0)
    with pytest.raises(MalformedReplyError):
        await session.turn([9], sampling_params=THREE)
    server.spoil = lambda reply: None
    with pytest.raises(MalformedRowsError, match="two kinds"):
        await session.turn([9], sampling_params=THREE, form="int32")
    is_whole(session, 5)


async def test_turns_at_once_are_taken_one_after_the_other(client: TandemClient) -> None:
    session = client.session()
    await asyncio.gather(*(session.turn([i, i], sampling_params=THREE) for i in range(5)))
    is_whole(session, 25)


async def test_before_the_first_turn_there_is_nothing(client: TandemClient) -> None:
    session = client.session()
    assert (session.token_ids, session.num_rows, session.bytes_received) == ([], 0, 0)
    with pytest.raises(ValueError, match="no turn"):
        session.rows  # noqa: B018
    with pytest.raises(ValueError, match="no turn"):
        await session.resume()
    assert len({client.session().session_id for _ in range(3)}) == 3
