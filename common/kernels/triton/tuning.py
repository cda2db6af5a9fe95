"""Launch parameters of the expert kernels: measured ones from `configs`, a plain guess for shapes that nobody has measured.

A config file belongs to one shape of expert; its entries are made by `python -m common.kernels.triton.tune`, whose command line
the file holds. An entry serves token counts up to its own.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
from msgspec import Struct

from common.kernels.interface import FP8_BLOCK, ExpertMatrices

CONFIGS = Path(__file__).parent / "configs"


class ExpertShape(NamedTuple):
    """One shape of expert, as one rank has it."""

    experts: int
    top_k: int
    hidden: int
    width: int
    fp8: bool = False

    @classmethod
    def of(cls, down_EDI: ExpertMatrices, top_k: int) -> Self:
        """The shape of which these matrices are."""
        experts, hidden, width = down_EDI.weight.shape
        return cls(experts, top_k, hidden, width, fp8=down_EDI.scale is not None)


class Tile(Struct, frozen=True, kw_only=True, order=True):
    """One kernel's tile: `m` assignments by `n` output columns, `k` inputs at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Tiles(Struct, frozen=True, kw_only=True):
    """The tiles of both expert products for steps of up to `tokens` tokens. Grouped products have the same `m` in both."""

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
    """Steps of more tokens than this go through the grouped products."""
    tiles: list[Tiles]
    """By rising `tokens`."""
    grouped: list[Tiles] = []
    """Those of the grouped products, where they are not torch's: of float8. By rising `tokens`."""


def config_path(shape: ExpertShape) -> Path:
    """Where the config of one shape of expert is, or would be."""
    name = f"experts{shape.experts}_top{shape.top_k}_hidden{shape.hidden}_width{shape.width}"
    return CONFIGS / f"{name}{'_fp8' * shape.fp8}.json"


@cache
def tuned_for(shape: ExpertShape) -> Tuned:
    """The measured parameters of a shape, or the guess."""
    path = config_path(shape)
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Tuned)
    return _guess_fp8() if shape.fp8 else _guess()


def _guess() -> Tuned:
    few, many = Tile(m=16, n=64, k=64, warps=4, stages=4), Tile(m=64, n=64, k=64, warps=4, stages=3)
    tiles = [Tiles(tokens=64, gate_up=few, down=few), Tiles(tokens=1024, gate_up=many, down=many)]
    return Tuned(command="", hardware="", single_tokens=2, few_tokens=512, tiles=tiles)


def _guess_fp8() -> Tuned:
    def tile(m: int, n: int, warps: int, stages: int) -> Tile:
        return Tile(m=m, n=n, k=FP8_BLOCK, warps=warps, stages=stages)

    few, more = tile(16, 64, 4, 4), tile(32, 64, 4, 4)
    small, large = tile(64, 128, 4, 3), tile(128, 128, 8, 3)
    return Tuned(
        command="",
        hardware="",
        single_tokens=2,
        few_tokens=256,
        tiles=[
            Tiles(tokens=128, gate_up=few, down=tile(16, 128, 4, 4)),
            Tiles(tokens=256, gate_up=more, down=tile(32, 128, 4, 4)),
        ],
        grouped=[Tiles(tokens=2048, gate_up=small, down=small), Tiles(tokens=8192, gate_up=large, down=large)],
    )


def best_of(tiles: list[Tiles], num_tokens: int) -> Tiles:
    """The tiles for a step of `num_tokens` tokens; the largest measured ones serve all larger steps."""
    return next((each for each in tiles if num_tokens <= each.tokens), tiles[-1])
