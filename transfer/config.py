"""Options of a transfer, the same for both ends."""

from typing import Annotated

from msgspec import Struct

from common.config import option


class TransferOptions(Struct, frozen=True, kw_only=True):
    """How KV pages get from prefill to decode."""

    lease_s: Annotated[
        float,
        option(
            "how long a prefilled prompt waits for a seat on its decode worker, and an asked room for its prompt",
            unit="s",
            gt=0,
        ),
    ] = 600.0
    transfer_deadline_s: Annotated[
        float, option("longest time from a decode worker's asking until the KV is there", unit="s", gt=0)
    ] = 300.0
