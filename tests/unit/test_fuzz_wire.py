"""Frames that nobody should send: each is a message of its union, or dropped and counted."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import TransferError
from common.messages import EngineToFrontend, FrontendToEngine
from common.wire import ControlDialer, _Codec, address
from tests.support.hostile import STABLE, damaged, mutated
from tests.unit.test_fuzz_replies import SMALL_VALUES
from tests.unit.test_wire import TO_DECODE, TO_ENGINE, TO_FRONTEND, TO_PREFILL
from transfer.messages import DecodeToPrefill, PrefillToDecode

UNIONS: list[Any] = [FrontendToEngine, EngineToFrontend, DecodeToPrefill, PrefillToDecode]
MESSAGES: list[Any] = [*TO_ENGINE, *TO_FRONTEND, *TO_PREFILL, *TO_DECODE]
ENCODED = [msgspec.msgpack.encode(message) for message in MESSAGES]


def check(data: bytes) -> None:
    """Through every channel: frames do not always come from who belongs there."""
    for union in UNIONS:
        codec: _Codec[Any, Any] = _Codec(union)
        message = codec.decode(data)
        assert (message is None) == (codec.num_undecodable == 1)
        if message is not None:
            assert isinstance(message, union)
            # It can be sent on: what was taken in has the types that it claims.
            assert codec.decode(codec.encode(message)) is not None


@STABLE
@given(damaged(ENCODED))
def test_damaged_bytes(data: bytes):
    check(data)


@STABLE
@given(mutated([value for data in ENCODED if len(value := msgspec.msgpack.decode(data)) > 1], SMALL_VALUES))
def test_mutated_messages(value: Any):
    check(msgspec.msgpack.encode(value))


@STABLE
@given(st.sampled_from(ENCODED), st.sampled_from([b"\x91", b"\x81\xa0", b"\x81"]), st.integers(0, 40))
def test_nesting_without_an_end(data: bytes, opening: bytes, at: int):
    check(data[:at] + opening * 10**5)


@pytest.mark.parametrize("number", range(len(MESSAGES)))
def test_the_good_ones_are_good(number: int):
    decoded = [_Codec[Any, Any](union).decode(ENCODED[number]) for union in UNIONS]
    assert MESSAGES[number] in decoded


@pytest.mark.parametrize("host", ["10.0.0.1", "prefill.example", "0.0.0.0", "::", "[2001:db8::1]", "127.0.0.1.example"])
def test_without_a_secret_nobody_beyond_this_host_is_dialed(host: str):
    """A client names the address; who is there would be told how to write into this worker's pages."""
    dialer: ControlDialer[PrefillToDecode, DecodeToPrefill] = ControlDialer("decode-a", PrefillToDecode)
    try:
        with pytest.raises(TransferError, match="secret-file"):
            dialer.dial(address(host, 8998))
        for local in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
            dialer.dial(address(local, 8998))
    finally:
        dialer.close()
