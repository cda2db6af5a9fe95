"""router_rate: requests/s through the router process, with two stub workers that answer at once.

    small        no rows, 64 connections
    int32 JSON   1024 prompt tokens and 256 output tokens with rows, 2.6 MB a reply, 16 connections
    msgpack      the same rows as 0.5 MB a reply

There is no other router here to run against, so each rate stands over two others of the same run: of one worker asked
directly, and of `floor_proxy`, which sends both legs and does nothing else. With int32 JSON, those two pass 2.6 MB on
that a worker has made, while the router merges, verifies and expands the compact rows of two workers.

Neighbours: `stub_workers`, `floor_proxy`, `load`.
"""

import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from common.process import free_ports
from common.protocol.replies import MSGPACK
from common.routed_experts.codec import rows_from_reply
from deploy.bench.children import HOST, child, url_of
from deploy.bench.figures import Figure, make_figure
from deploy.bench.load import Load, LoadResult, generate_load
from deploy.bench.material import Exchange, make_rows
from deploy.bench.options import BenchError, BenchOptions
from deploy.bench.rounds import alternate

_NAME: Final = "router_rate"
_ROUTER: Final = "router"
_JSON: Final = "application/json"
_DURATION_S: Final = 3.0


class Case(Struct, frozen=True):
    """One kind of request."""

    name: str
    connections: int
    rows: bool
    accept: str
    exchange: Exchange


SMALL: Final = Case("small bodies", 64, False, _JSON, Exchange(16, 4))
ROWS_JSON: Final = Case("1024+256 rows, int32 JSON", 16, True, _JSON, Exchange(1024, 256))
ROWS_MSGPACK: Final = Case("1024+256 rows, msgpack", 16, True, MSGPACK, Exchange(1024, 256))


def run(options: BenchOptions) -> list[Figure]:
    """Measure all cases. Raises BenchError."""
    return [figure for case in (SMALL, ROWS_JSON, ROWS_MSGPACK) for figure in measure(case, options)]


def measure(case: Case, options: BenchOptions) -> list[Figure]:
    """Measure one case. Raises BenchError if a request fails or the router answers with other rows than the stubs'."""
    body = request_body(case)
    results: list[LoadResult] = []

    def rate(url: str) -> float:
        load = Load(
            url=url,
            body=body,
            accept=case.accept,
            connections=case.connections,
            duration_s=_DURATION_S * options.scale,
        )
        results.append(generate_load(load))
        return results[-1].answers_per_s

    with _running(case.exchange) as urls:
        _check_reply(urls[_ROUTER], case, body)
        rates = alternate({name: lambda url=url: rate(url) for name, url in urls.items()}, options.rounds)  # type: ignore[misc]
    return [
        make_figure(_NAME, case.name, "requests/s", (_ROUTER, rates[_ROUTER]), (name, rates[name]))
        for name in urls
        if name != _ROUTER
    ]


def request_body(case: Case) -> bytes:
    """Write the request that every connection sends."""
    body: dict[str, Any] = {
        "input_ids": list(range(case.exchange.prompt_tokens)),
        "sampling_params": {"max_new_tokens": case.exchange.output_tokens, "temperature": 0.0},
        "stream": False,
    }
    if case.rows:
        body["return_routed_experts"] = True
    return msgspec.json.encode(body)


@contextmanager
def _running(exchange: Exchange) -> Iterator[dict[str, str]]:
    """Start everything; yields the URLs of what is compared, by name."""
    prefill, decode, router, proxy = free_ports(4)
    sizes = [str(exchange.prompt_tokens), str(exchange.output_tokens)]
    with ExitStack() as children:
        stubs = child("deploy.bench.stub_workers", [str(prefill), str(decode), *sizes], ports=[prefill, decode])
        children.enter_context(stubs)
        flags = [f"--host={HOST}", f"--port={router}", "--log-level=warning", f"--decode={url_of(decode)}"]
        flags += ["--prefill", url_of(prefill), "1"]
        children.enter_context(child("router", flags, ports=[router]))
        floor = [str(proxy), url_of(prefill), url_of(decode)]
        children.enter_context(child("deploy.bench.floor_proxy", floor, ports=[proxy]))
        yield {_ROUTER: url_of(router), "a worker, directly": url_of(decode), "floor of aiohttp": url_of(proxy)}


def _check_reply(url: str, case: Case, body: bytes) -> None:
    """Look once at what the router answers: a rate of refusals would mean nothing."""
    headers = {"Content-Type": _JSON, "Accept": case.accept}
    request = urllib.request.Request(f"{url}/generate", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = response.read()
    except OSError as error:
        raise BenchError(f"the router refuses the benchmark's request: {error}") from error
    reply = (msgspec.msgpack if case.accept == MSGPACK else msgspec.json).decode(answer)
    exchange = case.exchange
    if len(reply["output_ids"]) != exchange.output_tokens:
        raise BenchError(f"the router answers with {len(reply['output_ids'])} tokens, not {exchange.output_tokens}")
    if case.rows:
        expected = np.concatenate([make_rows(exchange.prompt_tokens), make_rows(exchange.output_tokens - 1)])
        if not np.array_equal(rows_from_reply(reply["meta_info"]), expected):
            raise BenchError("the router answers with other rows than the workers")
