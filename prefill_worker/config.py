"""Config of a prefill worker."""

from typing import Annotated

from msgspec import Struct

from common.config import EngineOptions, ModelOptions, RegistrationOptions, ServerOptions, option
from transfer.config import TransferOptions


class PrefillOptions(Struct, frozen=True, kw_only=True):
    """What only a prefill worker has."""

    chunked_prefill_tokens: Annotated[
        int, option("tokens of one step at most, over all prompts", unit="tokens", ge=1)
    ] = 16384
    bootstrap_host: Annotated[str, option("address that the control socket for decode workers listens on")] = (
        "127.0.0.1"
    )
    bootstrap_port: Annotated[
        int, option("port of that socket; with --dp each group has one, at the ports from there on", ge=1, le=65535)
    ] = 8998
    prefix_cache: Annotated[bool, option("keep prompts' KV and rows for later prompts that begin alike")] = True


class PrefillConfig(Struct, frozen=True):
    """All options of a prefill worker, by group."""

    model: ModelOptions
    engine: EngineOptions
    prefill: PrefillOptions
    transfer: TransferOptions
    server: ServerOptions
    registration: RegistrationOptions
