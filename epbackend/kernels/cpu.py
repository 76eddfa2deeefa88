"""Experts on a CPU: each slot's matrices reordered once for oneDNN, and put in huge pages.

A MoE layer multiplies few rows with many matrices, so it runs at the speed at which the matrices come from memory.
Three things bring it near that speed: oneDNN's own blocked layout, huge pages (2 MiB, so that walking the memory needs
few address translations), and never multiplying fewer than four rows, which oneDNN does slower than four.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from epbackend.kernels import Prepacked
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Matrix, Int8Weights
from epbackend.kernels.reference import ReferenceKernels
from epbackend.kernels.weight_formats import Matrices, stacked

FEWEST_ROWS = 4
"""Measured on Zen 4: 1, 2, 3, 4 rows take 5.5, 6.0, 4.1, 3.8 ms in float32, and 2.9, 2.9, 2.8, 2.7 ms in bfloat16."""

BLOCK_ROWS = 256


class CpuKernels(ReferenceKernels):
    """The reference with a faster matrix product. Prepacked matrices are a list, so that one slot can be replaced.

    Quantized experts are left to the reference, which is slow: good for trying things out.
    """

    def prepack(self, weights_LNK: Matrices) -> Prepacked:
        if isinstance(weights_LNK, Fp8Blocks | Int8Weights):
            return stacked(weights_LNK)
        packed = [
            weight if isinstance(weight, Int8Matrix) else _prepack_one(weight) for weight in weights_LNK
        ]
        return stacked(packed) if isinstance(packed[0], Int8Matrix) else packed

    def slot_memory(self, packed: Prepacked, slot: int) -> list[Tensor]:
        if not isinstance(packed, list):
            return super().slot_memory(packed, slot)
        weight_NK = packed[slot]
        if not weight_NK.is_mkldnn:
            return [weight_NK.view(-1).view(torch.uint8)]
        # A blocked tensor has no view; matrices of one shape are blocked alike, so that bytes can be exchanged.
        length = torch.ops.mkldnn._nbytes(weight_NK)
        memory = (ctypes.c_uint8 * length).from_address(torch.ops.mkldnn.data_ptr(weight_NK))
        return [torch.frombuffer(memory, dtype=torch.uint8)]

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        """Block by block: a float32 copy of all rows at once costs page faults, and memory that no cutoff bounds."""
        blocks = zip(rows_SD.split(BLOCK_ROWS), choice_of_row_S.split(BLOCK_ROWS), strict=True)
        for rows_MD, choice_of_row_M in blocks:
            super().unpermute(rows_MD, choice_of_row_M, weights_TK, out_TD)

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Prepacked, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        if not isinstance(packed, list) or not packed[0].is_mkldnn:
            return super().grouped_matmul(rows_SK, packed, counts_L, bias_LN)
        rows_SN = rows_SK.new_empty(rows_SK.shape[0], packed[0].shape[0])
        first = 0
        for slot, count in enumerate(counts_L.tolist()):
            if count:
                # A slot with few rows takes some of its neighbours' along; their products are discarded.
                start = max(0, min(first, len(rows_SK) - FEWEST_ROWS))
                rows_MK = rows_SK[start : max(first + count, start + FEWEST_ROWS)]
                bias_N = None if bias_LN is None else bias_LN[slot]
                rows_MN = torch.ops.mkldnn._linear_pointwise(rows_MK, packed[slot], bias_N, "none", [], "")
                rows_SN[first : first + count] = rows_MN[first - start : first - start + count]
                first += count
        return rows_SN


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a fast layout for `dtype` on this processor; otherwise a plain copy is multiplied.

    Few processors have one for float16 (AVX512-FP16 or AVX-NE-CONVERT): elsewhere bfloat16 is the fast half precision.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _prepack_one(weight_NK: Tensor) -> Tensor:
    if not can_prepack(weight_NK.dtype):
        return weight_NK.detach().clone()
    # Without a hint of the rows oneDNN picks the blocked layout; a hint of one row would leave float32 plain.
    packed_NK = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), None)
    use_huge_pages(torch.ops.mkldnn.data_ptr(packed_NK), torch.ops.mkldnn._nbytes(packed_NK))
    return packed_NK


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
