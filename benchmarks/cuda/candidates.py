"""Which tiles are worth timing for a product."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.tile import Tile

BYTES = {"half": 2, "fp8": 1, "int8": 1, "float32": 4}


def candidates(form: str, gated: bool, family: Tile, chip: Chip) -> list[Tile]:
    """The family's own tile first; then neighbours of it that fit the shared memory."""
    found = (
        _memory_bound(form, gated) if family.rows <= 16 else _compute_bound(form, gated, family.rows, chip)
    )
    fitting = [tile for tile in found if _shared_bytes(tile, form, gated) <= chip.shared_bytes]
    return list(dict.fromkeys([family, *fitting]))


def _memory_bound(form: str, gated: bool) -> list[Tile]:
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


def _compute_bound(form: str, gated: bool, rows: int, chip: Chip) -> list[Tile]:
    """Many rows: large tiles, one or two programs on a multiprocessor, warps that load beside warps that multiply."""
    if form == "fp8":
        sizes = (
            [(64, 128, 128), (128, 128, 128)] if gated else [(64, 128, 128), (128, 128, 128), (128, 64, 128)]
        )
    else:
        wide = (64, 128) if gated else (128, 256)
        depths = (64,) if form == "half" else (64, 128)
        sizes = list(product((64, 128) if rows >= 128 else (32, 64), wide, depths))
    plain = [
        Tile(*size, warps, stages, band=band, programs=programs, flatten=flatten)
        for size, warps, stages, band, programs, flatten in product(
            sizes, (4, 8), (3, 4), (8, 16), (1, 2), (False, True)
        )
        if (programs == 1) == (size[0] * size[1] >= 128 * 128 or warps == 8)
    ]
    if chip.capability[0] != 9:
        return plain
    specialized = [
        Tile(*size, 4, stages, band=8, specialize=True)
        for size, stages in product(sizes, (2, 3, 4))
        if size[0] >= 64
    ]
    return plain + [replace(tile, band=band) for tile, band in product(specialized, (8, 16))]


def _shared_bytes(tile: Tile, form: str, gated: bool) -> int:
    """Of all programs on a multiprocessor: the blocks under way."""
    columns = tile.columns * (2 if gated else 1)
    return (tile.rows + columns) * tile.depth * BYTES[form] * tile.stages * tile.programs
