"""Reading the documents of the repository: their fenced blocks, by language."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def fenced_blocks(text: str, language: str) -> list[str]:
    """The contents of the blocks that begin with three backticks and `language`, in order."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block_with(blocks: list[str], mark: str) -> str:
    """The one block that has `mark` in it; an assertion fails if there are none or several."""
    found = [block for block in blocks if mark in block]
    assert len(found) == 1, f"{len(found)} blocks have {mark!r} in them"
    return found[0]
