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

BLOCK = 1024


def unpermute(rows_SD: Tensor, source_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
    """Add weight * row to each row's token in `out_TD` (float32). Rows with source -1 are not read."""
    (rows, width), (tokens, top_k) = rows_SD.shape, weights_TK.shape
    if rows == 0 or tokens == 0:
        return
    row_of_TK = torch.full((tokens, top_k), -1, dtype=torch.int32, device=rows_SD.device)
    _look_up[(triton.cdiv(rows, BLOCK),)](source_S, row_of_TK, rows, BLOCK)
    columns = min(BLOCK, triton.next_power_of_2(width))
    _weighted_sum[(tokens, triton.cdiv(width, columns))](
        rows_SD,
        row_of_TK,
        weights_TK,
        out_TD,
        rows_SD.stride(0),
        weights_TK.stride(0),
        weights_TK.stride(1),
        out_TD.stride(0),
        width,
        top_k,
        columns,
    )


@triton.jit
def _look_up(source_S, row_of_TK, S, BLOCK: tl.constexpr):
    """The inverse of source_S: a choice is served by one row at most."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_S + row, mask=row < S, other=-1)
    tl.store(row_of_TK + source, row, mask=source >= 0)


@triton.jit
def _weighted_sum(
    rows_SD,
    row_of_TK,
    weights_TK,
    out_TD,
    row_stride,
    weight_token_stride,
    weight_choice_stride,
    out_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's columns: its rows one after the other, as k grows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = out_TD + token * out_stride + column
    total = tl.load(place, mask=column < D)
    for k in tl.static_range(K):
        row = tl.load(row_of_TK + token * K + k).to(tl.int64)
        weight = tl.load(weights_TK + token * weight_token_stride + k * weight_choice_stride).to(tl.float32)
        values = tl.load(rows_SD + row * row_stride + column, mask=(row >= 0) & (column < D), other=0)
        total += weight * values.to(tl.float32)
    tl.store(place, total, mask=column < D)
