"""The workload file: one JSON object a line, each a prompt to send.

    {"prompt": "..."}                                  text, tokenized by the server
    {"input_ids": [1, 2, 3], "max_new_tokens": 8}      tokens; every form may name its own number of new tokens
    {"messages": [{"role": "user", "content": "..."}]} a chat, rendered here with the tokenizer's chat template

It knows no HTTP: `deploy.replay.client` sends the samples that this module reads.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from transformers import AutoTokenizer

from common.errors import UsageError

SHIPPED_WORKLOAD = Path(__file__).with_name("workload.jsonl")

Text = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[int, Meta(ge=0)]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat."""

    role: Text
    content: str


class Line(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line as it is written; exactly one of the first three is there."""

    prompt: Text | None = None
    input_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=0)] | None = None


class Sample(Struct, frozen=True, kw_only=True):
    """One request to make: text or token ids, and the line it comes from."""

    line: int
    text: str | None = None
    input_ids: list[int] | None = None
    max_new_tokens: int


def load_tokenizer(checkpoint: str) -> Any:
    """Load a checkpoint's tokenizer; raises UsageError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer at {checkpoint}: {error}") from error


def read_workload(path: Path, *, max_new_tokens: int, tokenizer: Any = None) -> list[Sample]:
    """Read all samples; a line without `max_new_tokens` gets the one given here.

    Raises UsageError naming file and line for a line that cannot be used, and for chats if there is no tokenizer.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    samples = [
        _sample(path, number, line, max_new_tokens, tokenizer) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not samples:
        raise UsageError(f"{path}: no prompt in it")
    return samples


def _sample(path: Path, number: int, text: bytes, max_new_tokens: int, tokenizer: Any) -> Sample:
    try:
        line = msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path}:{number}: {error}") from error
    if sum(form is not None for form in (line.prompt, line.input_ids, line.messages)) != 1:
        raise UsageError(f"{path}:{number}: a line has exactly one of prompt, input_ids and messages")
    input_ids = line.input_ids
    if line.messages is not None:
        if tokenizer is None:
            raise UsageError(f"{path}:{number}: messages need a chat template: name --tokenizer or --reference")
        input_ids = _render(path, number, line.messages, tokenizer)
    return Sample(
        line=number,
        text=line.prompt,
        input_ids=input_ids,
        max_new_tokens=max_new_tokens if line.max_new_tokens is None else line.max_new_tokens,
    )


def _render(path: Path, number: int, messages: list[Message], tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise UsageError(f"{path}:{number}: the tokenizer {tokenizer.name_or_path} has no chat template for messages")
    turns = [msgspec.to_builtins(message) for message in messages]
    # As token ids: sent as text, the template's own special tokens could be added a second time.
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
