"""Which tiles are worth timing for a product."""

from __future__ import annotations

from itertools import product

from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.tile import Tile
from epbackend.kernels.triton.tuning.job import BYTES

FEWEST_SUMS, MOST_SUMS = 32, 128
"""Accumulators of a thread: with fewer the matrix units wait for data, with more registers run out."""


def candidates(form: str, gated: bool, family: Tile, chip: Chip) -> list[Tile]:
    """The family's own tile first; then those whose blocks fit the shared memory."""
    found = memory_bound(form, gated) if family.rows <= 16 else compute_bound(form, gated, family.rows, chip)
    fitting = [tile for tile in found if _shared_bytes(tile, form, gated) <= chip.shared_bytes]
    return list(dict.fromkeys([family, *fitting]))


def memory_bound(form: str, gated: bool) -> list[Tile]:
    """Few rows: what counts is how many bytes are under way, and how evenly the tiles fall on the chip."""
    columns = (128,) if form == "fp8" and gated else (32, 64, 128)
    depths = (128,) if form == "fp8" else (128, 256)
    return [
        Tile(16, each, depth, warps, stages, band=1, programs=programs, flatten=flatten)
        for each, depth, warps, stages, programs, flatten in product(
            columns, depths, (4, 8), (3, 4, 5), (1, 2, 3, 4), (False, True)
        )
        if warps == 4 or each == 128
    ]


def compute_bound(form: str, gated: bool, rows: int, chip: Chip) -> list[Tile]:
    """Many rows: large tiles, one or two programs on a multiprocessor, warps that load beside warps that multiply."""
    sizes = [
        (each, columns, 64 if form == "half" else 128)
        for each, columns in product((64, 128) if rows >= 128 else (32, 64), _columns(form, gated))
    ]
    pipelined = [
        Tile(*size, warps, stages, band=band, programs=programs, flatten=flatten)
        for size, warps, stages, band, programs, flatten in product(
            sizes, (4, 8), (3, 4), (8, 16), (1, 2), (False, True)
        )
    ]
    specialized = [
        Tile(*size, 4, stages, band=band, specialize=True)
        for size, stages, band in product(sizes, (2, 3, 4), (8, 16))
        if chip.capability[0] == 9 and size[0] >= 64
    ]
    return [tile for tile in pipelined if _registers_fit(tile, gated)] + specialized


def _columns(form: str, gated: bool) -> tuple[int, ...]:
    if form == "fp8":
        return (128,) if gated else (64, 128)
    return (64, 128) if gated else (128, 256)


def _registers_fit(tile: Tile, gated: bool) -> bool:
    """Whether the sums of a thread are neither too few nor too many for the programs that share the registers."""
    sums = tile.rows * tile.columns * (2 if gated else 1) // (32 * tile.warps)
    return FEWEST_SUMS <= sums <= MOST_SUMS and sums * tile.warps * tile.programs <= 8 * MOST_SUMS


def _shared_bytes(tile: Tile, form: str, gated: bool) -> int:
    """Of all programs on a multiprocessor: the blocks under way."""
    columns = tile.columns * (2 if gated else 1)
    return (tile.rows + columns) * tile.depth * BYTES[form] * tile.stages * tile.programs
