"""loop_stall: how long an event loop is blocked at most while it makes the reply to a 32k-token request with all its rows.

A heartbeat runs in the loop of the router, and in that of a worker's frontend, and notes how late it is; everything else
(workers, engine, client) is in other processes. The other side is the same loop with nothing to do, for as long: what is
left then is the machine's, which on few cores is not nothing. The lines named "work" count the processor time of the
loop's thread alone, and so leave out other processes, but also what other threads of this one have kept it from.

Neighbours: `watched_router` and `watched_frontend` (the processes with a heartbeat), `heartbeat`.
"""

import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import msgspec
from msgspec import Struct

from common.process import free_ports
from common.protocol.replies import MSGPACK
from deploy.bench.children import child, url_of
from deploy.bench.figures import Figure, Target, make_figure
from deploy.bench.heartbeat import PATH, Worst
from deploy.bench.material import LONG_TOKENS
from deploy.bench.options import BenchError, BenchOptions
from deploy.bench.rounds import alternate

_NAME: Final = "loop_stall"
_IDLE: Final = "idle"
_OUTPUT_TOKENS: Final = 64
_READ_BYTES: Final = 2**20
_LEAST_IDLE_S: Final = 0.05
# The worst of few says little, and a round is short.
_ROUNDS_FACTOR: Final = 2


class Form(Struct, frozen=True):
    """One kind of reply."""

    name: str
    accept: str
    stream: bool = False


FORMS: Final = (
    Form("msgpack", MSGPACK),
    Form("int32 JSON", "application/json"),
    Form("int32 stream", "text/event-stream", stream=True),
)


def run(options: BenchOptions) -> list[Figure]:
    """Measure both event loops, in milliseconds. Raises BenchError."""
    prompt_tokens = max(1, options.scaled(LONG_TOKENS) - _OUTPUT_TOKENS)
    figures: list[Figure] = []
    for place, running in (("router", _watched_router), ("worker", _watched_frontend)):
        with running(prompt_tokens) as url:
            figures += measure(place, url, prompt_tokens, options)
    return figures


def measure(place: str, url: str, prompt_tokens: int, options: BenchOptions) -> list[Figure]:
    """Ask a process with a heartbeat for every form in turn. Raises BenchError if it refuses."""
    worst: dict[str, list[Worst]] = {_IDLE: [], **{form.name: [] for form in FORMS}}
    durations_s = [_LEAST_IDLE_S]

    def measured(name: str, action: Callable[[], None]) -> float:
        _take_worst(url)
        began = time.perf_counter()
        action()
        durations_s.append(time.perf_counter() - began)
        worst[name].append(_take_worst(url))
        return worst[name][-1].delay_s

    def busy(form: Form) -> float:
        return measured(form.name, lambda: _ask(url, form, prompt_tokens))

    def idle() -> float:
        return measured(_IDLE, lambda: time.sleep(durations_s[-1]))

    alternate(
        {_IDLE: idle, **{form.name: lambda form=form: busy(form) for form in FORMS}},  # type: ignore[misc]
        options.rounds * _ROUNDS_FACTOR,
    )
    rows = prompt_tokens + _OUTPUT_TOKENS - 1

    def figure(form: Form, what: str, values: Callable[[Worst], float], target: Target | None) -> Figure:
        # The first round of each was to warm up.
        a, b = ([1e3 * values(each) for each in worst[name][1:]] for name in (form.name, _IDLE))
        case = f"{place}, {rows:,} rows, {what}"
        return make_figure(_NAME, case, "ms", (form.name, a), (_IDLE, b), statistic="worst", target=target)

    aim = Target(of="A", bound="at most", limit=5)
    return [
        *(figure(form, "delay", lambda each: each.delay_s, aim) for form in FORMS),
        *(figure(form, "work", lambda each: each.work_s, None) for form in FORMS),
    ]


@contextmanager
def _watched_router(prompt_tokens: int) -> Iterator[str]:
    prefill, decode, router = free_ports(3)
    sizes = [str(prompt_tokens), str(_OUTPUT_TOKENS)]
    with ExitStack() as children:
        stubs = child("deploy.bench.stub_workers", [str(prefill), str(decode), *sizes], ports=[prefill, decode])
        children.enter_context(stubs)
        urls = [url_of(prefill), url_of(decode)]
        children.enter_context(child("deploy.bench.watched_router", [str(router), *urls], ports=[router]))
        yield url_of(router)


@contextmanager
def _watched_frontend(prompt_tokens: int) -> Iterator[str]:
    (port,) = free_ports(1)
    arguments = [str(port), str(prompt_tokens + _OUTPUT_TOKENS - 1)]
    with child("deploy.bench.watched_frontend", arguments, ports=[port]):
        yield url_of(port)


def _ask(url: str, form: Form, prompt_tokens: int) -> None:
    """Ask once, and read the reply without looking at it."""
    # Both kinds of server take the same request: a router draws rooms of its own.
    body: dict[str, Any] = {
        "input_ids": [1] * prompt_tokens,
        "sampling_params": {"max_new_tokens": _OUTPUT_TOKENS, "temperature": 0.0},
        "stream": form.stream,
        "return_routed_experts": True,
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": 1,
        "bootstrap_room": 1,
    }
    headers = {"Content-Type": "application/json", "Accept": form.accept}
    request = urllib.request.Request(f"{url}/generate", data=msgspec.json.encode(body), headers=headers)
    num_bytes = 0
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            while part := response.read(_READ_BYTES):
                num_bytes += len(part)
    except OSError as error:
        raise BenchError(f"{url} refuses the benchmark's request: {error}") from error
    least = prompt_tokens * 48 * 8
    if num_bytes < least:
        raise BenchError(f"{url} answers with {num_bytes} bytes; the rows alone are {least}")


def _take_worst(url: str) -> Worst:
    """Fetch the worst beats since the last call."""
    with urllib.request.urlopen(f"{url}{PATH}", timeout=60) as response:
        return msgspec.json.decode(response.read(), type=Worst)
