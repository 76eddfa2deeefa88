"""The ways in which a CPU multiplies rows with the matrices of their slots; `choice` finds which is fastest where.

library    torch's own product of each slot: MKL in float32, torch's loops in half precision
compiled   all slots in one call of `compiled`
onednn     oneDNN's product of each slot, with the matrix in oneDNN's own blocked layout

The first two read matrices as they are given, the last one reorders them once. In either layout they lie in huge pages
(2 MiB), so that walking the memory needs few address translations: a MoE layer multiplies few rows with many matrices,
and runs at the speed at which these come from memory.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear


def library(
    rows_SK: Tensor, matrices_L: list[Tensor], first_L: np.ndarray, last_L: np.ndarray, out_SN: Tensor
) -> None:
    """Fill the slots' rows of `out_SN`, slot by slot."""
    for slot in np.flatnonzero(last_L > first_L):
        part = slice(first_L[slot], last_L[slot])
        if part.stop - part.start == 1:  # a matrix and a vector: `mm` takes longer
            out_SN[part] = linear(rows_SK[part], matrices_L[slot])
        else:
            torch.mm(rows_SK[part], matrices_L[slot].t(), out=out_SN[part])


def compiled(
    rows_SK: Tensor,
    matrices_at_L: np.ndarray,
    first_L: np.ndarray,
    last_L: np.ndarray,
    dtype: torch.dtype,
    outputs: int,
    scale_LBB: Tensor | None = None,
) -> Tensor:
    """sums_SN (float32) for matrices of `dtype` at these addresses: see `compiled.grouped_product`."""
    # Late, because importing numba takes half a second, in every rank.
    from epbackend.kernels.cpu.compiled import grouped_product

    row_type = torch.int16 if dtype == torch.int8 else torch.float32
    rows_SK = rows_SK.to(row_type).contiguous()
    return grouped_product(rows_SK, matrices_at_L, first_L, last_L, dtype, outputs, scale_LBB)


def onednn(
    rows_SK: Tensor,
    packed_L: list[Tensor],
    first_L: np.ndarray,
    last_L: np.ndarray,
    out_SN: Tensor,
    fewest_rows: int = 1,
) -> None:
    """Fill the slots' rows of `out_SN`, slot by slot, `fewest_rows` or more at a time where there are so many.

    On some processors oneDNN is slower with one row than with four.
    """
    for slot in np.flatnonzero(last_L > first_L):
        first, last = int(first_L[slot]), int(last_L[slot])
        # A slot with few rows takes some of its neighbours' along; their products are discarded.
        start = max(0, min(first, len(rows_SK) - fewest_rows))
        rows_MK = rows_SK[start : max(last, start + fewest_rows)]
        rows_MN = torch.ops.mkldnn._linear_pointwise(rows_MK, packed_L[slot], None, "none", [], "")
        out_SN[first:last] = rows_MN[first - start : last - start]


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a fast product of `dtype` on this processor.

    Few processors have one of float16 (AVX512-FP16 or AVX-NE-CONVERT), and those with AVX2 alone none of bfloat16.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def reordered(weight_NK: Tensor) -> Tensor:
    """A copy of a matrix in oneDNN's blocked layout."""
    # Without a hint of the rows oneDNN picks the blocked layout; a hint of one row would leave float32 plain.
    packed_NK = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), None)
    use_huge_pages(torch.ops.mkldnn.data_ptr(packed_NK), torch.ops.mkldnn._nbytes(packed_NK))
    return packed_NK


def bytes_of(matrix_NK: Tensor) -> Tensor:
    """A matrix's memory, in either layout: uint8, to be read and replaced."""
    if not matrix_NK.is_mkldnn:
        return matrix_NK.view(-1).view(torch.uint8)
    # A blocked tensor has no view; matrices of one shape are blocked alike, so that bytes can be exchanged.
    length = torch.ops.mkldnn._nbytes(matrix_NK)
    memory = (ctypes.c_uint8 * length).from_address(torch.ops.mkldnn.data_ptr(matrix_NK))
    return torch.frombuffer(memory, dtype=torch.uint8)


HUGE_PAGE = 1 << 21
MADV_COLLAPSE = 25
"""Linux 6.1 and later: moves what is already written. Older kernels refuse it, which costs speed and nothing else."""


def use_huge_pages(address: int, nbytes: int) -> None:
    """Ask Linux to hold [address, address + nbytes) in huge pages, if it is at least one long.

    The range is rounded outwards: experts' matrices lie side by side in memory, and inwards would leave out the seams.
    """
    madvise = _madvise()
    if madvise is None or nbytes < HUGE_PAGE:
        return
    first = address // HUGE_PAGE * HUGE_PAGE
    last = -(-(address + nbytes) // HUGE_PAGE) * HUGE_PAGE
    madvise(first, last - first, MADV_COLLAPSE)


@cache
def _madvise():
    """The C library's madvise, or None where there is no Linux."""
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
