"""Config of an aggregated worker."""

from typing import Annotated

from msgspec import Struct

from common.config import EngineOptions, ModelOptions, RegistrationOptions, ServerOptions, option, parse_config


class AggregatedOptions(Struct, frozen=True, kw_only=True):
    """How an aggregated worker computes prompts."""

    chunked_prefill_tokens: Annotated[
        int, option("prompt tokens of one step at most, over all prompts", unit="tokens", ge=1)
    ] = 16384
    prefix_cache: Annotated[bool, option("keep prompts' KV and rows for later prompts that begin alike")] = True


class AggregatedConfig(Struct, frozen=True):
    """All options of an aggregated worker, by group."""

    model: ModelOptions
    engine: EngineOptions
    aggregated: AggregatedOptions
    server: ServerOptions
    registration: RegistrationOptions


def read_config(argv: list[str]) -> AggregatedConfig:
    """Read the worker's flags; UsageError for what cannot be used."""
    description = "Tandem's aggregated worker: computes prompts and generates on one engine."
    return parse_config(AggregatedConfig, argv, prog="python -m deploy.aggregated_worker", description=description)
