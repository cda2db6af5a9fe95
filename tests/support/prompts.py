"""Random prompts for tests."""

import random


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
