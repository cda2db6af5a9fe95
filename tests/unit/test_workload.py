"""The workload file: each form of a line, and a clear word for each that cannot be used."""

import json
from pathlib import Path

import pytest

from common.errors import UsageError
from deploy.replay.workload import SHIPPED_WORKLOAD, Sample, read_workload


class ChatTokenizer:
    """Renders a chat as the lengths of its turns."""

    name_or_path = "chat"
    chat_template: str | None = "{{ messages }}"

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt
        assert tokenize
        assert not return_dict
        return [len(message["content"]) for message in messages]


class PlainTokenizer(ChatTokenizer):
    chat_template = None


def write(folder: Path, *lines: object) -> Path:
    path = folder / "workload.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_form_of_a_line_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "Grüße"},
        {"input_ids": [5, 6], "max_new_tokens": 0},
        "",
        {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": ""}]},
    )
    assert read_workload(path, max_new_tokens=9, tokenizer=ChatTokenizer()) == [
        Sample(line=1, text="Grüße", max_new_tokens=9),
        Sample(line=2, input_ids=[5, 6], max_new_tokens=0),
        Sample(line=4, input_ids=[3, 0], max_new_tokens=9),
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ({}, "exactly one of"),
        ({"prompt": "a", "input_ids": [1]}, "exactly one of"),
        ({"prompt": ""}, "length >= 1"),
        ({"prompt": 5}, "Expected `str | null`"),
        ({"input_ids": []}, "length >= 1"),
        ({"input_ids": [-1]}, ">= 0"),
        ({"prompt": "a", "max_new_tokens": -1}, ">= 0"),
        ({"promt": "a"}, "promt"),
        ({"messages": [{"role": "user"}]}, "content"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: object, word: str) -> None:
    path = write(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(UsageError) as error:
        read_workload(path, max_new_tokens=1)
    assert str(error.value).startswith(f"{path}:2: ")
    assert word in str(error.value)


def test_messages_need_a_tokenizer_with_a_chat_template(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(UsageError, match=r":1: messages need a chat template: name --tokenizer or --reference"):
        read_workload(path, max_new_tokens=1)
    with pytest.raises(UsageError, match=r":1: the tokenizer chat has no chat template"):
        read_workload(path, max_new_tokens=1, tokenizer=PlainTokenizer())


def test_a_missing_or_an_empty_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_workload(tmp_path / "nothing.jsonl", max_new_tokens=1)
    with pytest.raises(UsageError, match="no prompt in it"):
        read_workload(write(tmp_path, "", ""), max_new_tokens=1)


def test_the_shipped_workload_is_varied() -> None:
    samples = read_workload(SHIPPED_WORKLOAD, max_new_tokens=32)
    texts = [sample.text for sample in samples if sample.text]
    assert len(texts) == len(samples) == len(set(texts)) == 16
    words = sorted(len(text.split()) for text in texts)
    assert words[0] <= 5
    assert words[-1] >= 200
    assert sum(not text.isascii() for text in texts) >= 4
    assert len({sample.max_new_tokens for sample in samples}) >= 3
