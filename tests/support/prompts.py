"""Prompts for tests."""

import random
from typing import Any

from common.messages import RequestOptions
from common.protocol.generate import Sample


def sample(**fields: Any) -> Sample:
    """What the router picks workers for: a prompt of one token unless these fields say otherwise."""
    whole: dict[str, Any] = {"rid": "mine", "options": RequestOptions()} | fields
    return Sample(**whole if {"text", "messages"} & fields.keys() else {"input_ids": (1,)} | whole)


def random_prompts(seed: int, count: int, *, longest: int = 300, vocab_size: int = 500) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, short ones more often; every third begins like an earlier one."""
    rng = random.Random(seed)
    prompts: list[list[int]] = [[rng.randrange(vocab_size)], [rng.randrange(vocab_size) for _ in range(longest)]]
    while len(prompts) < count:
        prompt = [rng.randrange(vocab_size) for _ in range(int(longest ** rng.random()))]
        if len(prompts) % 3 == 0:
            elder = rng.choice([p for p in prompts if len(p) > 20])
            prompt = (elder[: rng.randrange(1, len(elder) + 1)] + prompt)[:longest]
        prompts.append(prompt)
    return prompts
