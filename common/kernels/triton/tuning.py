"""Launch parameters of the expert kernels: measured ones from `configs`, a plain guess for shapes that nobody has measured.

A config file belongs to one shape of expert; its entries are made by `python -m common.kernels.triton.tune`, whose command line
the file holds. An entry serves token counts up to its own.
"""

from functools import cache
from pathlib import Path

import msgspec
from msgspec import Struct

CONFIGS = Path(__file__).parent / "configs"


class Tile(Struct, frozen=True, kw_only=True, order=True):
    """One kernel's tile: `m` assignments by `n` output columns, `k` inputs at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Tiles(Struct, frozen=True, kw_only=True):
    """The tiles of both expert products for steps of up to `tokens` tokens."""

    tokens: int
    gate_up: Tile
    down: Tile


class Tuned(Struct, frozen=True, kw_only=True):
    """A config file."""

    command: str
    hardware: str
    single_tokens: int
    """Up to as many tokens, each assignment goes for itself."""
    few_tokens: int
    """Steps of more tokens than this go through the grouped product."""
    tiles: list[Tiles]
    """By rising `tokens`."""


def config_path(*, num_experts: int, top_k: int, hidden_size: int, width: int) -> Path:
    """Where the config of one shape of expert is, or would be."""
    return CONFIGS / f"experts{num_experts}_top{top_k}_hidden{hidden_size}_width{width}.json"


@cache
def tuned_for(*, num_experts: int, top_k: int, hidden_size: int, width: int) -> Tuned:
    """The measured parameters of a shape, or the guess."""
    path = config_path(num_experts=num_experts, top_k=top_k, hidden_size=hidden_size, width=width)
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Tuned)
    few, many = Tile(m=16, n=64, k=64, warps=4, stages=4), Tile(m=64, n=64, k=64, warps=4, stages=3)
    guess = [Tiles(tokens=64, gate_up=few, down=few), Tiles(tokens=1024, gate_up=many, down=many)]
    return Tuned(command="", hardware="", single_tokens=2, few_tokens=512, tiles=guess)


@cache
def tiles_for(num_tokens: int, *, num_experts: int, top_k: int, hidden_size: int, width: int) -> Tiles:
    """The tiles for a step of `num_tokens` tokens; the largest measured ones serve all larger steps."""
    tiles = tuned_for(num_experts=num_experts, top_k=top_k, hidden_size=hidden_size, width=width).tiles
    return next((each for each in tiles if num_tokens <= each.tokens), tiles[-1])
