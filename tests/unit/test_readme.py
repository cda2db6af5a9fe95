"""What the documents name exists: paths, links, and modules that `python -m` runs."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import REPOSITORY, block_with, fenced_blocks

DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "DECISIONS.md", "common/routed_experts/README.md"]

LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"python -m ([\w.]+)")
TOP_LEVEL = {entry.name for entry in REPOSITORY.iterdir()}


def named_paths(text: str, folder: Path) -> Iterator[Path]:
    """Targets of links, relative to the document, and inline code that begins like a path of the repository."""
    for target in LINK.findall(text):
        if "://" not in target:
            yield folder / target
    for code in INLINE_CODE.findall(text):
        first, slash, _ = code.partition("/")
        if slash and first in TOP_LEVEL and re.fullmatch(r"[\w./-]+", code):
            yield REPOSITORY / code


def missing(text: str, folder: Path) -> list[str]:
    """What a document names and does not exist."""
    paths = [str(path) for path in named_paths(text, folder) if not path.exists()]
    return paths + [module for module in MODULE.findall(text) if not runs(module)]


def runs(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and (
            spec.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None
        )
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_everything_that_is_named_exists(document: str):
    path = REPOSITORY / document
    assert missing(path.read_text(encoding="utf-8"), path.parent) == []


def test_the_search_finds_what_it_should():
    """The check can fail: a link, a path and three modules that are not there, among some that are."""
    text = (
        "[gone](router/gone.py) and [here](router/app.py), `deploy/nothing.py` and `deploy/up.py`, `P/G` is no path; "
        "`python -m deploy.down`, `python -m nowhere.at.all`, `python -m transfer` and `python -m deploy.up`"
    )
    assert missing(text, REPOSITORY) == [
        str(REPOSITORY / "router/gone.py"),
        str(REPOSITORY / "deploy/nothing.py"),
        "deploy.down",
        "nowhere.at.all",
        "transfer",
    ]


def test_the_readme_has_its_fifteen_stops_in_order():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition("## One request, fifteen stops")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^ ?(\d+)\. \[", section, re.MULTILINE)] == list(range(1, 16))


def test_blocks_are_found_by_their_language():
    text = "```python\na = 1\n```\n\n    text\n```bash\ncurl x\n```\n```\nplain\n```\n"
    assert fenced_blocks(text, "python") == ["a = 1\n"]
    assert fenced_blocks(text, "bash") == ["curl x\n"]


def test_a_block_is_found_by_what_it_alone_has():
    assert block_with(["a = 1\n", "b = 1\n"], "b") == "b = 1\n"
    for mark in ("c", "= 1"):
        with pytest.raises(AssertionError):
            block_with(["a = 1\n", "b = 1\n"], mark)
