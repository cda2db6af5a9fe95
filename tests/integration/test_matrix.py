"""Every shape of request, every start, every form of rows, cold and from the prefix cache: each row against transformers'."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from deploy.stack import Stack, running_stack
from tests.support.http_client import Client, rows_in
from tests.support.judge import Judge, Tally

SHAPE = "mixed"
G = 5
PROMPTS = [[*range(60, 99)], [*range(100, 117)]]
MESSAGES = [{"role": "user", "content": "Tell me about the river, the bridge and the harbour, please."}]
SHAPES = [
    "single",
    "list",
    "n=2",
    "stream",
    "stream list",
    "completions",
    "completions list",
    "completions stream",
    "chat",
    "chat stream",
    "chat return_meta_info",
]


@pytest.fixture(scope="module")
def stack(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [f"--model={checkpoint_of(SHAPE)}", "--device=cpu", "--cpu-threads=1", "--page-size=4"]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


@pytest.fixture
async def client(stack: Stack):
    async with Client(stack.url) as opened:
        yield opened
        await opened.quiet_stats()


class Expected:
    """What transformers makes of a prompt, greedily: its tokens and rows."""

    def __init__(self, judge: Judge, prompt: list[int]) -> None:
        self.judge = judge
        self.prompt = prompt
        self.output_ids = judge.reference.generate(prompt, G)
        self.num_layers = 6
        self.moe_layer_ids = [1, 5]

    def check(self, fields: dict[str, Any], start: int, form: str) -> None:
        """`fields` hold the rows of positions `[start, P+G-1)`, as int32 over all layers or compact."""
        rows = rows_in(fields)
        assert fields["routed_experts_start_len"] == start
        assert fields["routed_experts_moe_layer_ids"] == self.moe_layer_ids
        if form == "int32":
            assert rows.dtype == np.int32
            assert fields["routed_experts_layer_ids"] == list(range(self.num_layers))
            dense = [layer for layer in range(self.num_layers) if layer not in self.moe_layer_ids]
            assert not rows[:, dense].any()
            rows = rows[:, self.moe_layer_ids]
        else:
            assert rows.dtype == np.uint8
            assert fields["routed_experts_layer_ids"] == self.moe_layer_ids
        tally = Tally()
        self.judge.add(tally, self.prompt, self.output_ids, rows, start=start)
        assert (tally.requests, tally.wrong, tally.ties) == (1, 0, 0)


def cases() -> Iterator[tuple[str, str, str]]:
    for shape, at, form in itertools.product(SHAPES, ["0", "P/2", "P"], ["int32", "auto", "msgpack"]):
        if form != "msgpack" or "stream" not in shape:
            yield shape, at, form


@pytest.mark.parametrize(("shape", "at", "form"), list(cases()))
async def test_rows(
    client: Client,
    checkpoint_of: Callable[[str], Path],
    judge_of: Callable[[str], Judge],
    shape: str,
    at: str,
    form: str,
):
    judge = judge_of(SHAPE)
    if "chat" in shape:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(SHAPE))
        rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True)
        prompts = [rendered["input_ids"]]
    else:
        prompts = PROMPTS if "list" in shape else PROMPTS[:1]
    shortest = min(map(len, prompts))
    start = {"0": 0, "P/2": shortest // 2, "P": shortest}[at]
    expected = [Expected(judge, prompt) for prompt in prompts]
    options = {
        "return_routed_experts": True,
        "routed_experts_start_len": start,
        "routed_experts_dtype": "int32" if form == "int32" else "auto",
    }
    for warm in (False, True):
        if not warm:
            assert (await client.post({}, path="/flush_cache"))[0] == 200
        if "completions" in shape or "chat" in shape:
            await openai_shape(client, shape, expected, options, start, form, warm=warm)
        else:
            await generate_shape(client, shape, expected, options, start, form, warm=warm)


async def generate_shape(
    client: Client,
    shape: str,
    expected: list[Expected],
    options: dict[str, Any],
    start: int,
    form: str,
    *,
    warm: bool,
) -> None:
    n = 2 if shape == "n=2" else 1
    prompts = [each.prompt for each in expected]
    body = {
        **options,
        "input_ids": prompts if "list" in shape else prompts[0],
        "sampling_params": {"temperature": 0, "max_new_tokens": G, "ignore_eos": True, "n": n},
    }
    if "stream" in shape:
        *events, done = await client.stream(**body)
        assert done == "[DONE]"
        last = {event.get("index", 0): event for event in events}
        replies = [last[index] for index in range(len(prompts) * n)]
    else:
        status, reply = await client.post(body, msgpack=form == "msgpack")
        assert status == 200, reply
        replies = reply if "list" in shape or n > 1 else [reply]
    assert len(replies) == len(prompts) * n
    for index, reply in enumerate(replies):
        each = expected[index // n]
        assert reply["output_ids"] == each.output_ids
        assert (reply["meta_info"]["cached_tokens"] > 0) == warm
        each.check(reply["meta_info"], start, form)


async def openai_shape(
    client: Client,
    shape: str,
    expected: list[Expected],
    options: dict[str, Any],
    start: int,
    form: str,
    *,
    warm: bool,
) -> None:
    chat, with_meta = "chat" in shape, "meta_info" in shape
    prompts = [each.prompt for each in expected]
    body: dict[str, Any] = {**options, "model": "any", "max_tokens": G, "temperature": 0, "ignore_eos": True}
    body |= {"messages": MESSAGES} if chat else {"prompt": prompts if "list" in shape else prompts[0]}
    body |= {"return_meta_info": True} if with_meta else {}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if "stream" in shape:
        *chunks, done = await client.stream(path=path, **body, stream_options={"include_usage": True})
        assert done == "[DONE]"
        [holder] = [chunk for chunk in chunks if "sglext" in chunk]
        usage = chunks[-1]["usage"]
    else:
        status, holder = await client.post(body, path=path, msgpack=form == "msgpack")
        assert status == 200, holder
        usage = holder["usage"]
        assert len(holder["choices"]) == len(prompts)
    assert usage["completion_tokens"] == G * len(prompts)
    assert usage["prompt_tokens"] == sum(map(len, prompts))
    assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == warm
    if with_meta:
        assert "sglext" not in holder
        for each, choice in zip(expected, holder["choices"], strict=True):
            each.check(choice["meta_info"], start, form)
    else:
        expected[0].check(holder["sglext"], start, form)
