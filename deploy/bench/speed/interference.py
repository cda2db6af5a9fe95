"""itl-under-prefill: what long prompts that arrive meanwhile do to the time between two tokens of those that decode.

Sixteen streams decode, alone; then sixteen again, while long prompts of which one token is asked come one after the
other. The ratio of the two p99s is what a user of the streams notices. Neighbours: `clients` (sends both), `online`.
"""

from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from deploy.bench.figures import Figure, make_figure
from deploy.bench.options import BenchError
from deploy.bench.rounds import alternate
from deploy.bench.speed.client import Reply
from deploy.bench.speed.clients import Clients
from deploy.bench.speed.judge import judge_all, make_round
from deploy.bench.speed.requests import Load, Server, make_job
from deploy.bench.speed.results import Case, Round, make_case
from deploy.bench.speed.workloads import INTERFERENCE, NO_TARGETS, Workload

ALONE: Final = "alone"
UNDER: Final = "under prefill"


class Interference(Struct, frozen=True, kw_only=True):
    """The streams, and the prompts beside them; more prompts than can come meanwhile, so that they do not run out."""

    streams: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 512
    long_prompts: int = 256
    long_prompt_tokens: int = 8192

    @property
    def workload(self) -> Workload:
        """The streams."""
        return Workload(INTERFERENCE, self.streams, self.prompt_tokens, self.output_tokens)


def measure_interference(
    clients: Clients,
    server: Server,
    interference: Interference,
    *,
    rounds: int,
    seed: int,
    serials: Iterator[int],
    deadline_s: float,
) -> tuple[list[Case], list[Figure]]:
    """Run rounds without and with long prompts in turn: both cases, and the ratios of ITL p50 and p99. Raises BenchError."""
    found: dict[str, list[Round]] = {ALONE: [], UNDER: []}

    def run(name: str) -> float:
        found[name].append(
            _run_once(clients, server, interference, name == UNDER, seed=seed, serials=serials, deadline_s=deadline_s)
        )
        return found[name][-1].tokens_per_s

    alternate({ALONE: lambda: run(ALONE), UNDER: lambda: run(UNDER)}, rounds)
    # The first of each is the one to warm up.
    cases = [make_case(interference.workload, name, each[1:], NO_TARGETS) for name, each in found.items()]
    return cases, [_ratio(cases, name, interference) for name in ("p50", "p99")]


def _run_once(
    clients: Clients,
    server: Server,
    interference: Interference,
    is_under: bool,
    *,
    seed: int,
    serials: Iterator[int],
    deadline_s: float,
) -> Round:
    streams = Load(
        requests=interference.streams,
        prompt_tokens=interference.prompt_tokens,
        output_tokens=interference.output_tokens,
        form="off",
        stream=True,
        seed=seed,
        serial=next(serials),
    )
    prompts = Load(
        requests=interference.long_prompts,
        prompt_tokens=interference.long_prompt_tokens,
        output_tokens=1,
        form="off",
        # As the streams: they share their headers.
        stream=True,
        seed=seed,
        serial=next(serials),
    )
    job = make_job(server, streams, deadline_s=deadline_s, background=prompts if is_under else None)
    replies = list(clients.run(job))
    judged = judge_all(
        (reply for reply in replies if not reply.in_background),
        target=server.target,
        form="off",
        stream=True,
        prompt_tokens=interference.prompt_tokens,
        num_experts=None,
    )
    if is_under:
        _check_prompts([reply for reply in replies if reply.in_background], interference, server)
    return make_round(judged, interference.workload)


def _check_prompts(replies: list[Reply], interference: Interference, server: Server) -> None:
    """Raise BenchError unless long prompts came, all were answered, and there were enough of them."""
    prompts = judge_all(
        replies,
        target=server.target,
        form="off",
        stream=True,
        prompt_tokens=interference.long_prompt_tokens,
        num_experts=None,
    )
    if not prompts or len(prompts) == interference.long_prompts:
        raise BenchError(f"{len(prompts)} of {interference.long_prompts} long prompts came while others decoded")


def _ratio(cases: list[Case], percentile: str, interference: Interference) -> Figure:
    def values(case: Case) -> list[float]:
        return [getattr(each.itl_ms, percentile) for each in case.rounds if each.itl_ms is not None]

    alone, under = cases
    what = f"ITL {percentile} with {interference.long_prompt_tokens}-token prompts"
    return make_figure(INTERFERENCE, what, "ms", (UNDER, values(under)), (ALONE, values(alone)))
