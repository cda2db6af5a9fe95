"""The secret that guards the control socket: where it is needed, and which files can hold one."""

from pathlib import Path

import pytest

from common.errors import UsageError
from transfer.config import TransferOptions, read_secret


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_none_is_needed_on_this_host(host: str):
    assert read_secret(TransferOptions(), listens_on=host) == b""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "prefill.example", "*", ""])
def test_one_is_needed_where_others_can_reach(host: str):
    with pytest.raises(UsageError, match="--secret-file is required"):
        read_secret(TransferOptions(), listens_on=host)


def test_a_dialer_needs_none():
    assert read_secret(TransferOptions()) == b""


def test_it_is_read_without_the_line_s_end(tmp_path: Path):
    path = tmp_path / "secret"
    path.write_bytes(b"0123456789abcdef\n")
    assert read_secret(TransferOptions(secret_file=str(path)), listens_on="0.0.0.0") == b"0123456789abcdef"


@pytest.mark.parametrize("content", [None, b"", b"short\n"])
def test_a_file_without_one(tmp_path: Path, content: bytes | None):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="--secret-file"):
        read_secret(TransferOptions(secret_file=str(path)))
