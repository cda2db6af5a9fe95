"""Options of a transfer, the same for both ends."""

from pathlib import Path
from typing import Annotated

from msgspec import Struct

from common.config import option
from common.errors import UsageError
from common.wire import is_loopback

MIN_SECRET_BYTES = 16


class TransferOptions(Struct, frozen=True, kw_only=True):
    """How KV pages get from prefill to decode."""

    transfer_deadline_s: Annotated[
        float,
        option(
            "longest time from a decode worker's asking until the KV is there, the prefill included", unit="s", gt=0
        ),
    ] = 300.0
    heartbeat_s: Annotated[
        float, option("how often a decode worker shows a prefill worker that it is there", unit="s", gt=0)
    ] = 1.0
    peer_deadline_s: Annotated[
        float, option("after how much silence a worker takes another one for lost", unit="s", gt=0)
    ] = 10.0
    lease_s: Annotated[
        float,
        option(
            "how long a prompt's KV waits for a decode worker that shows no interest in it, an asked room for its prompt,"
            " and a finished one for its last writes",
            unit="s",
            gt=0,
        ),
    ] = 30.0
    secret_file: Annotated[
        str,
        option(
            "file with a secret that prefill and decode workers share; needed where the control socket can be reached"
            " from other hosts",
            metavar="FILE",
        ),
    ] = ""


def read_secret(options: TransferOptions, *, listens_on: str | None = None) -> bytes:
    """Read the shared secret; empty if there is none.

    Raises UsageError if it cannot be read, or if a worker would listen on an address beyond this host without one.
    """
    if not options.secret_file:
        if listens_on is not None and not is_loopback(listens_on):
            raise UsageError(
                f"--bootstrap-host {listens_on} can be reached from other hosts: --secret-file is required"
            )
        return b""
    try:
        secret = Path(options.secret_file).read_bytes().strip()
    except OSError as error:
        raise UsageError(f"--secret-file {options.secret_file}: {error.strerror}") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise UsageError(f"--secret-file {options.secret_file}: shorter than {MIN_SECRET_BYTES} bytes")
    return secret
