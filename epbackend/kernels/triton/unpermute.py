"""Weighted sum of the experts' rows for each token, in float32 and always in the order of the token's choices.

Each token looks its own rows up, so no two programs add to the same place and no atomics are needed:

    source_S   = [2, 5, 0, -1]                      # K = 2; the last row is garbage
    row_of_TK  = [[2, -1], [0, -1], [-1, 1]]        # which row serves each choice
    out_TD[0] += weights_TK[0, 0] * rows_SD[2], out_TD[1] += weights_TK[1, 0] * rows_SD[0], ...
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_BLOCK = 1024

FEWEST, MOST_ROWS = 16, 4096
"""Up to here each token searches all rows for its own, which spares the launches that build a table."""


def unpermute(rows_SD: Tensor, source_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
    """Add weight * row to each row's token in `out_TD` (float32). Rows with source -1 are not read."""
    (rows, width), (tokens, top_k) = rows_SD.shape, weights_TK.shape
    if rows == 0 or tokens == 0:
        return
    few = rows <= MOST_ROWS
    columns = min(SUM_BLOCK, triton.next_power_of_2(width))
    _weighted_sum[(tokens, triton.cdiv(width, columns))](
        rows_SD,
        source_S if few else _row_of_choice(source_S, tokens * top_k),
        weights_TK,
        out_TD,
        rows,
        rows_SD.stride(0),
        weights_TK.stride(0),
        weights_TK.stride(1),
        out_TD.stride(0),
        width,
        top_k,
        columns,
        triton.next_power_of_2(max(FEWEST, rows)) if few else 0,
    )


def _row_of_choice(source_S: Tensor, choices: int) -> Tensor:
    """The inverse of source_S, -1 for choices that no row serves."""
    row_of = torch.full((choices,), -1, dtype=torch.int64, device=source_S.device)
    _invert[(triton.cdiv(len(source_S), SUM_BLOCK),)](source_S, row_of, len(source_S), SUM_BLOCK)
    return row_of


@triton.jit(do_not_specialize=["S"])
def _invert(source_S, row_of, S, BLOCK: tl.constexpr):
    """A choice is served by one row at most, so no two programs write to the same place."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_S + row, mask=row < S, other=-1)
    tl.store(row_of + source, row.to(tl.int64), mask=source >= 0)


@triton.jit(do_not_specialize=["S"])
def _weighted_sum(
    rows_SD,
    lookup,
    weights_TK,
    out_TD,
    S,
    row_stride,
    weight_token_stride,
    weight_choice_stride,
    out_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALL: tl.constexpr,
):
    """One token's columns: its rows one after the other, as k grows.

    `lookup` is the row of each choice, or, where ALL is a power of two that holds all rows, the source of each row.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = out_TD + token * out_stride + column
    total = tl.load(target, mask=column < D)
    if ALL:
        each = tl.arange(0, ALL)
        source = tl.load(lookup + each, mask=each < S, other=-1)
    for k in tl.static_range(K):
        if ALL:
            row = tl.max(tl.where(source == token * K + k, each, -1)).to(tl.int64)
        else:
            row = tl.load(lookup + token * K + k)
        weight = tl.load(weights_TK + token * weight_token_stride + k * weight_choice_stride).to(tl.float32)
        values = tl.load(rows_SD + row * row_stride + column, mask=(row >= 0) & (column < D), other=0)
        total += weight * values.to(tl.float32)
    tl.store(target, total, mask=column < D)
