"""silu(gate) * up as a launch of its own, for rows whose gate_up product was not fused with it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def swiglu(rows_S2F: Tensor) -> Tensor:
    """rows_SF, computed in float32 and rounded once."""
    rows, width = len(rows_S2F), rows_S2F.shape[1] // 2
    rows_SF = rows_S2F.new_empty(rows, width)
    if rows:
        _swiglu[(rows, triton.cdiv(width, BLOCK))](rows_S2F, rows_SF, rows_S2F.stride(0), width, BLOCK)
    return rows_SF


@triton.jit
def _swiglu(rows_S2F, rows_SF, row_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(rows_S2F + row * row_stride + column, mask=column < F, other=0).to(tl.float32)
    up = tl.load(rows_S2F + row * row_stride + F + column, mask=column < F, other=0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(rows_SF + row * F + column, out.to(rows_SF.dtype.element_ty), mask=column < F)
