"""Rows in 8 bits for their way between ranks, in one launch; see `epbackend.kernels.Kernels.narrow`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.fp8 import BLOCK, FP8
from epbackend.kernels.triton.quantise import to_fp8

GROUPS = 8
"""Groups of 128 values that one program quantises."""


def narrow(rows_TD: Tensor, values_TD: Tensor, scale_TG: Tensor) -> None:
    (tokens, width), scales = rows_TD.shape, scale_TG.shape[1]
    float8 = values_TD.dtype == FP8
    groups, group = (GROUPS, BLOCK) if float8 else (1, triton.next_power_of_2(width))
    if tokens:
        _narrow[(tokens, triton.cdiv(scales, groups))](
            rows_TD,
            values_TD,
            scale_TG,
            rows_TD.stride(0),
            values_TD.stride(0),
            scale_TG.stride(0),
            width,
            scales,
            groups,
            group,
            float8,
            num_warps=4 if float8 else 8,
        )


@triton.jit
def _narrow(
    rows_TD,
    values_TD,
    scale_TG,
    row_stride,
    value_stride,
    scale_stride,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Some groups of one token."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(rows_TD + token * row_stride + column, mask=column < D, other=0).to(tl.float32)
    if FLOAT8:
        quantised, scale = to_fp8(values)
    else:
        quantised, scale = _to_int8(values)
    tl.store(values_TD + token * value_stride + column, quantised, mask=column < D)
    tl.store(scale_TG + token * scale_stride + group, scale, mask=group < SCALES)


@triton.jit
def _to_int8(values_MN):
    """(int8 values, scale of each row) of a block; the scale brings the row's largest value to 127."""
    largest_M = tl.max(tl.abs(values_MN), 1)
    scale_M = tl.where(largest_M > 0, largest_M / 127.0, 1.0)
    scaled_MN = values_MN / scale_M[:, None]
    # Half away from zero; rounding to even is a call to libdevice, which the interpreter does not have.
    return tl.where(scaled_MN < 0, scaled_MN - 0.5, scaled_MN + 0.5).to(tl.int8), scale_M
