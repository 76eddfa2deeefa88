"""Pieces that the grouped matmuls share: which tile comes next, how blocks are loaded, multiplied and stored."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels, on a CPU: set by TRITON_INTERPRET=1 before the first import."""


@triton.jit
def find_tile(tile, tiles_M3, row_tiles, column_tiles, BAND: tl.constexpr):
    """(slot, first row, end of the slot's rows, column tile) of the tile-th tile.

    Tiles come in bands of BAND row tiles, and within a band column after column: those that run at the same time share
    BAND row blocks and few column blocks, which stay in the L2 cache.
    """
    band = tile // (BAND * column_tiles)
    rows_of_band = tl.minimum(row_tiles - band * BAND, BAND)
    within = tile - band * BAND * column_tiles
    entry = tiles_M3 + 3 * (band * BAND + within % rows_of_band)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), within // rows_of_band


@triton.jit
def load_block(
    matrix, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """block [ROWS, COLUMNS] of a row-major matrix; zeros past its last row and column.

    `matrix` is a tensor descriptor with TMA, otherwise a pointer; the copy engine knows the bounds by itself.
    """
    if TMA:
        block = matrix.load([row, column])
    else:
        at_row = row + tl.arange(0, ROWS)
        at_column = column + tl.arange(0, COLUMNS)
        inside = (at_row < rows)[:, None] & (at_column < columns)[None, :]
        place = matrix + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
        block = tl.load(place, mask=inside, other=0.0)
    return block


@triton.jit
def load_pair(
    matrix, slot, column, depth, N, K, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr
):
    """[2 * COLUMNS, DEPTH]: the same rows of the gate's and of the up's matrix of a slot, which lie N rows apart."""
    if TMA:
        block = tl.reshape(matrix.load([2 * slot, column, depth]), (2 * COLUMNS, DEPTH))
    else:
        each = tl.arange(0, 2 * COLUMNS)
        at_row = column + each % COLUMNS
        at_column = depth + tl.arange(0, DEPTH)
        inside = (at_row < N)[:, None] & (at_column < K)[None, :]
        row = ((2 * slot + each // COLUMNS) * N + at_row).to(tl.int64)
        block = tl.load(matrix + row[:, None] * K + at_column[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def multiply(block_MK, block_NK, sum_MN):
    """sum_MN + block_MK times the transposed block_NK; float32 blocks are multiplied in full precision."""
    if INTERPRETED and block_MK.dtype == tl.bfloat16:
        # Triton 3.7's interpreter would multiply the bit patterns of bfloat16.
        product = tl.dot(block_MK.to(tl.float32), block_NK.to(tl.float32).T, sum_MN, input_precision="ieee")
    else:
        product = tl.dot(block_MK, block_NK.T, sum_MN, input_precision="ieee", out_dtype=sum_MN.dtype)
    return product


@triton.jit
def swiglu(gate_MN, up_MN):
    """silu(gate) * up, in float32."""
    return gate_MN * tl.sigmoid(gate_MN) * up_MN


@triton.jit
def one_a_column(values_N, column_N, N):
    """[1, columns] in float32 of a bias or a scale; zeros past N."""
    return tl.load(values_N + column_N, mask=column_N < N, other=0).to(tl.float32)[None, :]


@triton.jit
def store_block(out_SN, values_MN, row_M, end, column_N, N):
    """Store the rows before `end` and the columns before N, in the matrix's own dtype."""
    inside = (row_M < end)[:, None] & (column_N < N)[None, :]
    place = out_SN + row_M.to(tl.int64)[:, None] * N + column_N[None, :]
    tl.store(place, values_MN.to(out_SN.dtype.element_ty), mask=inside)
