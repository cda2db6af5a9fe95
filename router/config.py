"""The router's options: which workers there are, and how it treats them.

It reads no socket. Neighbours: `common.config` (flags, TOML and help derive from these declarations), `process`.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Struct

from common.config import ServerOptions, check_url, option, parse_config
from common.errors import UsageError

PolicyName = Literal["random", "round_robin", "least_loaded", "power_of_two", "cache_aware", "consistent_hashing"]


class RouterOptions(Struct, frozen=True, kw_only=True):
    """The workers of the start, and how requests are spread over them; others join by POST /workers."""

    prefill: Annotated[
        tuple[tuple[str, int], ...],
        option("a prefill worker: its URL and its bootstrap port; repeatable", metavar=("URL", "BOOTSTRAP_PORT")),
    ] = ()
    decode: Annotated[tuple[str, ...], option("a decode worker's URL; repeatable", metavar="URL")] = ()
    worker: Annotated[
        tuple[str, ...],
        option("an aggregated worker's URL, in the place of prefill and decode workers; repeatable", metavar="URL"),
    ] = ()
    policy: Annotated[
        PolicyName,
        option("how workers are picked; a request with a routing key goes by consistent hashing in any case"),
    ] = "least_loaded"
    balance_abs_threshold: Annotated[
        int,
        option("cache_aware: legs that a worker may have more than the least loaded one", unit="legs", ge=0),
    ] = 32
    balance_rel_threshold: Annotated[
        float, option("cache_aware: how many times as many it may have; both must be exceeded", gt=0)
    ] = 1.5
    verify_rows: Annotated[bool, option("check every routed-expert row of a leg once more before the merge")] = True
    max_retries: Annotated[
        int, option("how often a prompt is tried again if a leg fails before anything was sent to the client", ge=0)
    ] = 2
    allow_mixed_versions: Annotated[
        bool, option("let weights of several versions compute one answer, unless its request says otherwise")
    ] = False
    breaker_failures: Annotated[
        int, option("failures in a row after which a worker gets no legs for a while", unit="failures", ge=1)
    ] = 5
    breaker_pause_s: Annotated[float, option("how long that is, before one leg is tried", unit="s", gt=0)] = 5.0
    health_interval_s: Annotated[float, option("pause between two health checks of a worker", unit="s", gt=0)] = 1.0
    health_timeout_s: Annotated[float, option("longest time that a worker's /health may take", unit="s", gt=0)] = 2.0
    unhealthy_after_s: Annotated[
        float, option("silence of a worker's /health after which its legs fail, and no more are sent", unit="s", gt=0)
    ] = 5.0
    connect_deadline_s: Annotated[float, option("longest time to connect to a worker", unit="s", gt=0)] = 5.0
    prefill_deadline_s: Annotated[
        float, option("longest time from a prefill leg's start to its reply", unit="s", gt=0)
    ] = 600.0
    first_token_deadline_s: Annotated[
        float,
        option(
            "streams: longest time from the prefill leg's reply to the decode leg's first event, transfer included",
            unit="s",
            gt=0,
        ),
    ] = 900.0
    idle_deadline_s: Annotated[
        float, option("streams: longest time between two events of a worker", unit="s", gt=0)
    ] = 300.0
    max_reply_bytes: Annotated[
        int, option("largest reply, or event of a stream, that a worker may send", unit="bytes", ge=1024)
    ] = 2 * 2**30
    control_deadline_s: Annotated[
        float,
        option(
            "longest time that a worker may take to flush its cache, abort, pause, continue or leave", unit="s", gt=0
        ),
    ] = 30.0
    weights_deadline_s: Annotated[
        float, option("longest time that a worker may take for an order about weights or memory", unit="s", gt=0)
    ] = 600.0
    worker_api_key: Annotated[str, option("the key that the workers ask for; empty: none")] = ""
    health_deadline_s: Annotated[float, option("longest time that GET /health_generate may take", unit="s", gt=0)] = (
        30.0
    )


class RouterConfig(Struct, frozen=True, kw_only=True):
    """All options of the router process."""

    router: RouterOptions
    server: ServerOptions = ServerOptions()


def parse_router_config(argv: list[str]) -> RouterConfig:
    """Read the router's flags; UsageError for anything that cannot be used, a malformed worker URL included."""
    config = parse_config(
        RouterConfig, argv, prog="python -m router", description="Tandem's router: one request, one pair of workers."
    )
    router = config.router
    pairs: list[tuple[str, Sequence[str]]] = [
        ("--prefill", [url for url, _ in router.prefill]),
        ("--decode", router.decode),
    ]
    for flag, urls in pairs:
        if urls and router.worker:
            raise UsageError(f"{flag}: there are pairs or aggregated workers (--worker), not both")
        if not urls and (router.prefill or router.decode):
            raise UsageError(
                f"{flag} is missing: name workers of both legs, or none, if they are to join by themselves"
            )
    for flag, urls in (*pairs, ("--worker", router.worker)):
        for url in urls:
            check_url(flag, url)
    for _, port in config.router.prefill:
        if not 1 <= port <= 65535:
            raise UsageError(f"--prefill: bootstrap port {port} is not in [1, 65535]")
    return config
