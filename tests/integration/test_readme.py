"""The README's examples do what it says: its Python and curl blocks run as they stand, against a real stack."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.replay.workload import load_tokenizer
from deploy.stack import Stack, running_stack
from tests.support.documents import REPOSITORY, block_with, fenced_blocks
from tests.support.judge import Judge, Tally

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON = fenced_blocks(README, "python")
CURL = [block for block in fenced_blocks(README, "bash") if block.startswith("curl ")]

# What each Python example alone has in it.
JSON, MSGPACK, OPENAI, CLIENT = "json.load(", "application/msgpack", "OpenAI(", "TandemClient("

README_URL = "http://127.0.0.1:8000"
SHAPE = "mixed"
MOE_LAYERS, NUM_LAYERS = [1, 5], 6


@pytest.fixture(scope="module")
def stack(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [f"--model={checkpoint_of(SHAPE)}", "--device=cpu", "--cpu-threads=1"]
    with running_stack(flags, log_file=tmp_path_factory.mktemp("stack") / "log") as running:
        yield running


def at(stack: Stack, block: str) -> str:
    """Point an example at the running stack."""
    assert README_URL in block
    return block.replace(README_URL, stack.url)


def run_python(stack: Stack, block: str) -> dict[str, Any]:
    """Execute an example; its variables."""
    variables: dict[str, Any] = {}
    exec(compile(at(stack, block), "README.md", "exec"), variables)
    return variables


def run_curl(stack: Stack, block: str) -> dict[str, Any]:
    """Execute an example in a shell; the reply."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    script = at(stack, block).replace("curl ", "curl --silent --show-error --max-time 60 ", 1)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=90, check=True)
    return json.loads(done.stdout)


def test_the_examples_are_found():
    assert len(CURL) == 1
    assert {block_with(PYTHON, mark) for mark in (JSON, MSGPACK, OPENAI, CLIENT)} == set(PYTHON)
    assert block_with(PYTHON, MSGPACK).count("\n") <= 10


def test_every_example_gives_the_rows_of_the_reference(
    stack: Stack, checkpoint_of: Callable[[str], Path], judge_of: Callable[[str], Judge]
):
    """All examples ask the same greedy question: the same rows, in each form, and the right ones."""
    reply = run_curl(stack, CURL[0])
    meta, output_ids = reply["meta_info"], reply["output_ids"]
    from_curl = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").reshape(meta["routed_experts_shape"])
    from_json, from_msgpack, from_openai = (
        run_python(stack, block_with(PYTHON, mark)) for mark in (JSON, MSGPACK, OPENAI)
    )

    assert from_curl.shape[:2] == (meta["prompt_tokens"] + len(output_ids) - 1, NUM_LAYERS)
    assert np.array_equal(from_json["rows"], from_curl)
    assert from_json["meta"]["routed_experts_moe_layer_ids"] == MOE_LAYERS
    rows = from_msgpack["rows"].numpy()
    assert np.array_equal(rows, from_curl[:, MOE_LAYERS])
    assert from_msgpack["meta"]["routed_experts_layer_ids"] == MOE_LAYERS
    assert np.array_equal(from_openai["rows"], from_curl)
    assert from_openai["reply"].choices[0].text == reply["text"]

    prompt = load_tokenizer(str(checkpoint_of(SHAPE)))(from_json["body"]["text"]).input_ids
    tally = Tally()
    judge_of(SHAPE).add(tally, prompt, output_ids, rows)
    tally.assert_clean()


def test_the_client_s_example_gives_the_rows_of_the_reference(stack: Stack, judge_of: Callable[[str], Judge]):
    reply, tally = run_python(stack, block_with(PYTHON, CLIENT))["reply"], Tally()
    assert len(reply.output_ids) > 0
    judge_of(SHAPE).add(tally, list(range(40, 60)), reply.output_ids, reply.rows, greedy=False)
    tally.assert_clean()


@pytest.mark.parametrize(
    ("mark", "right", "wrong"),
    [
        (JSON, 'meta["completion_tokens"] - 1', 'meta["completion_tokens"]'),
        (OPENAI, "total_tokens - 1", "total_tokens"),
        (CLIENT, "len(reply.output_ids) - 1", "len(reply.output_ids)"),
    ],
)
def test_an_example_that_is_wrong_fails(stack: Stack, mark: str, right: str, wrong: str):
    """The check can fail: an example's own assertion sees a reply that is one token off."""
    block = block_with(PYTHON, mark)
    assert right in block
    with pytest.raises(AssertionError):
        run_python(stack, block.replace(right, wrong))
