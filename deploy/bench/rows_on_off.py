"""rows_on_off: what returning routed experts costs a whole stack, in output tokens/s through 1P+1D and the router.

Rounds without rows, with rows as int32 JSON (the default form) and with rows as msgpack alternate over one running
stack. The workload is the shipped one, so the prompts are short and mostly cached after the first round.

Neighbours: `deploy.stack` (the processes), `deploy.replay.client` (the requests).
"""

import asyncio
from pathlib import Path

from deploy.answers import ReplyForm
from deploy.bench.figures import Figure, Target, make_figure
from deploy.bench.options import BenchError, BenchOptions
from deploy.bench.rounds import alternate
from deploy.demo import demo_checkpoint
from deploy.replay.client import RequestSettings, send_all
from deploy.replay.workload import Sample, load_tokenizer, read_workload
from deploy.stack import running_stack

_NAME = "rows_on_off"
# A round of the shipped workload alone is over in a third of a second.
_REPEATS = 6
_FORMS: dict[ReplyForm, str] = {"int32": "int32 JSON", "msgpack": "msgpack"}


def run(options: BenchOptions) -> list[Figure]:
    """Start a stack and measure it. Raises UsageError, StackError or BenchError."""
    model = options.model or str(demo_checkpoint())
    tokenizer = load_tokenizer(model)
    samples = read_workload(Path(options.workload), max_new_tokens=options.max_new_tokens, tokenizer=tokenizer)
    with running_stack([f"--model={model}", f"--device={options.device}"]) as stack:
        return measure(stack.url, samples[: options.scaled(len(samples))] * _REPEATS, options)


def measure(url: str, samples: list[Sample], options: BenchOptions) -> list[Figure]:
    """Run the rounds against a stack that is up. Raises BenchError if a request fails."""

    def speed(rows: bool, form: ReplyForm) -> float:
        return _tokens_per_s(url, samples, options, rows=rows, form=form)

    # The first round of each kind fills the prefix cache and opens connections.
    speeds = alternate(
        {
            "off": lambda: speed(False, "int32"),
            "int32": lambda: speed(True, "int32"),
            "msgpack": lambda: speed(True, "msgpack"),
        },
        options.rounds,
    )
    return [
        make_figure(
            _NAME,
            "1P+1D, demo model",
            "tokens/s",
            (f"rows as {name}", speeds[form]),
            ("no rows", speeds["off"]),
            target=Target(of="ratio", bound="at least", limit=0.99),
        )
        for form, name in _FORMS.items()
    ]


def _tokens_per_s(url: str, samples: list[Sample], options: BenchOptions, *, rows: bool, form: ReplyForm) -> float:
    settings = RequestSettings(
        url=url, concurrency=options.concurrency, temperature=0.0, rows=rows, deadline_s=600.0, form=form
    )
    run = asyncio.run(send_all(samples, settings, lambda: None))
    failures = [outcome.failure for outcome in run.outcomes if outcome.failure]
    if failures:
        raise BenchError(f"{len(failures)} of {len(samples)} requests failed, the first with: {failures[0]}")
    return sum(len(outcome.reply.output_ids) for outcome in run.outcomes if outcome.reply) / run.wall_s
