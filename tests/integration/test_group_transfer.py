"""Groups of several processes transfer to each other over NIXL: every byte of every rank's pool is where it should be.

The pools are those of `tests.support.group_rank`; what each should hold in the end is computed here from tables written by hand.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from common.process import PARENT_PID_VARIABLE, free_port
from tests.support.group_rank import HEAD_DIM, NUM_LAYERS, NUM_PAGES, PAGE_SIZE, SCRIPT
from tests.support.processes import REPOSITORY, end, read_line

HELD = {
    (1, 4): ["0123"],
    (2, 4): ["01", "23"],
    (4, 4): ["0", "1", "2", "3"],
    (1, 2): ["01"],
    (2, 2): ["0", "1"],
    (4, 2): ["0", "0", "1", "1"],
}
"""Heads of each rank, by the group's size and the model's number of heads."""
HEAD_ELEMENTS = NUM_LAYERS * 2 * PAGE_SIZE * HEAD_DIM


@contextmanager
def rank_process(arguments: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.group_rank", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment, PARENT_PID_VARIABLE: str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    try:
        yield process
    finally:
        end(process)
        assert process.stdin is not None
        process.stdin.close()


def page_of(page: int, heads: str, num_heads: int) -> list[float]:
    """The numbers of these heads of a page that has never been written, one after another."""
    firsts = [1 + (page * num_heads + int(head)) * HEAD_ELEMENTS for head in heads]
    return list(itertools.chain.from_iterable(range(first, first + HEAD_ELEMENTS) for first in firsts))


def expected_pool(heads: str, num_heads: int, source_of: dict[int, int]) -> list[list[float]]:
    """A decode rank's pool: negative, but for the pages that were written."""
    return [
        page_of(source_of[page], heads, num_heads)
        if page in source_of
        else [-number for number in page_of(page, heads, num_heads)]
        for page in range(NUM_PAGES)
    ]


@pytest.mark.parametrize(
    ("num_senders", "num_receivers", "num_heads", "transport"),
    [(1, 1, 4, ""), (2, 1, 4, ""), (1, 2, 4, "tcp"), (2, 2, 4, ""), (1, 4, 4, ""), (4, 2, 2, ""), (2, 4, 2, "tcp")],
)
def test_every_byte_arrives_where_it_should(
    tmp_path: Path, num_senders: int, num_receivers: int, num_heads: int, transport: str
):
    """Over TCP nothing lands in a follower that does not look."""
    port = str(free_port())
    environment = {"UCX_TLS": transport} if transport else {}
    sizes = {"prefill": num_senders, "decode": num_receivers}
    with ExitStack() as stack:
        ranks: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        for role, size in sizes.items():
            (tmp_path / role).mkdir()
            for index in range(size):
                file = str(tmp_path / f"{role}-{index}.npy")
                arguments = [role, str(tmp_path / role), str(index), str(size), str(num_heads), port, file]
                ranks[role, index] = stack.enter_context(rank_process(arguments, environment))
        assert [read_line(ranks["decode", 0]) for _ in SCRIPT] == ["arrived"] * len(SCRIPT)
        for process in ranks.values():
            assert process.stdin is not None
            process.stdin.write(b"save\n")
            assert read_line(process) == "saved"
    source_of: dict[int, int] = {}
    for prompt in SCRIPT:
        source_of |= dict(zip(prompt.decode_pages, prompt.prefill_pages[prompt.first_page :], strict=True))
    for index, heads in enumerate(HELD[num_receivers, num_heads]):
        pool = np.load(tmp_path / f"decode-{index}.npy").reshape(NUM_PAGES, -1)
        assert pool.tolist() == expected_pool(heads, num_heads, source_of)
    for index, heads in enumerate(HELD[num_senders, num_heads]):
        pool = np.load(tmp_path / f"prefill-{index}.npy").reshape(NUM_PAGES, -1)
        assert pool.tolist() == [page_of(page, heads, num_heads) for page in range(NUM_PAGES)]
