"""Config of a decode worker."""

from msgspec import Struct

from common.config import EngineOptions, ModelOptions, RegistrationOptions, ServerOptions
from transfer.config import TransferOptions


class DecodeConfig(Struct, frozen=True):
    """All options of a decode worker, by group."""

    model: ModelOptions
    engine: EngineOptions
    transfer: TransferOptions
    server: ServerOptions
    registration: RegistrationOptions
