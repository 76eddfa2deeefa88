"""Few tiles for each product, for a GPU that is there for a minute: `benchmarks.cuda.tune --quick`.

Chosen by hand for Hopper's shared memory: what `epbackend tune` would try, without what is unlikely to be the best.
Products in 8 bits try the one in use and those with a warp that loads. Widths are those of a gated product, which
multiplies as many columns of gate and of up; a plain one takes twice as many.
"""

from __future__ import annotations

from dataclasses import replace

from epbackend.kernels.triton.tiles import Chip, Tile
from epbackend.kernels.triton.tuning import FEW_ROWS, MEMORY_BOUND, TuningCase, specialized_tile

DECODE = (
    Tile(16, 64, 128, warps=4, stages=3, band=1, programs=2),
    Tile(16, 64, 128, warps=4, stages=3, band=1, programs=2, flatten=True),
    Tile(16, 64, 128, warps=4, stages=4, band=1, programs=2),
    Tile(16, 32, 128, warps=4, stages=4, band=1, programs=3),
)
"""Up to 8 rows a slot."""

THICK = (
    Tile(32, 64, 128, warps=4, stages=3, band=1, programs=2),
    Tile(32, 64, 128, warps=4, stages=3, band=1, programs=2, flatten=True),
    Tile(32, 64, 64, warps=4, stages=6, band=1, programs=2),
    Tile(32, 32, 128, warps=4, stages=5, band=1, programs=2),
    Tile(32, 32, 128, warps=4, stages=3, band=1, programs=4),
    Tile(32, 64, 128, warps=8, stages=6, band=1),
    Tile(64, 32, 128, warps=4, stages=3, band=1, programs=2),
    Tile(64, 64, 64, warps=4, stages=4, programs=2),
    Tile(64, 64, 64, warps=4, stages=4, programs=2, flatten=True),
)
"""Up to 32: all rows of a slot in one tile, whose weights come from memory once."""

MIDDLE = (
    Tile(64, 64, 64, warps=4, stages=4, programs=2),
    Tile(64, 64, 64, warps=4, stages=4, programs=2, flatten=True),
    Tile(64, 128, 64, warps=4, stages=5, flatten=True),
    Tile(64, 128, 64, warps=8, stages=4, flatten=True),
    Tile(128, 64, 64, warps=4, stages=3, programs=2),
    Tile(128, 64, 64, warps=8, stages=3, programs=2),
    Tile(128, 128, 64, warps=8, stages=4, flatten=True),
)
"""Up to 64."""

PREFILL = (
    Tile(128, 128, 64, warps=8, stages=4, flatten=True),
    Tile(128, 128, 64, warps=8, stages=4),
    Tile(128, 128, 64, warps=8, stages=4, band=4, flatten=True),
    Tile(128, 128, 64, warps=8, stages=4, band=16, flatten=True),
    Tile(128, 64, 64, warps=4, stages=3, programs=2),
    Tile(128, 64, 64, warps=4, stages=3, programs=2, flatten=True),
)
TAILS = (
    Tile(64, 128, 64, warps=4, stages=2, programs=2),
    Tile(64, 128, 32, warps=4, stages=5, programs=2),
    Tile(64, 128, 64, warps=8, stages=4, flatten=True),
)
"""Up to 256, where a tile of 128 rows often has few of them."""

GATHERED_FROM = 256
"""Rows a slot from which on it may pay to read rows where the tokens lie."""


def shortlist(case: TuningCase, in_use: Tile, chip: Chip) -> list[Tile]:
    """The tile in use first."""
    rows = case.rows_per_slot
    specialized = [
        specialized_tile(case.weight_format, case.gated, band)
        for band in (4, 8, 16)
        if rows > MEMORY_BOUND and chip.specializes
    ]
    if case.weight_format != "half":
        return list(dict.fromkeys([in_use, *specialized]))
    if rows <= FEW_ROWS:
        found = DECODE
    elif rows <= MEMORY_BOUND:
        found = THICK
    elif rows <= 64:
        found = MIDDLE
    else:
        found = PREFILL + (TAILS if rows <= 256 else ())
    if not case.gated:
        found = tuple(replace(tile, columns=2 * tile.columns) for tile in found)
    gathers = case.gated and rows >= GATHERED_FROM
    gathered = [replace(tile, gather=True) for tile in found[:2] if gathers]
    return list(dict.fromkeys([in_use, *found, *specialized, *gathered]))
