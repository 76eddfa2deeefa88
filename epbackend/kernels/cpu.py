"""Experts on a CPU: each slot's matrices reordered once for oneDNN, and put in huge pages.

A MoE layer multiplies few rows with many matrices, so it runs at the speed at which the matrices come from memory.
oneDNN reads its own blocked layout about 1.4 times (bfloat16) to 2 times (float32) faster than a plain matrix, and
huge pages add a tenth by sparing the address translation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from epbackend.kernels.hugepages import use_huge_pages
from epbackend.kernels.reference import ReferenceKernels


class CpuKernels(ReferenceKernels):
    """The reference with a faster matrix product. A packed weight is a list, so that one slot can be replaced."""

    def pack(self, weights_LNK: Iterable[Tensor]) -> list[Tensor]:
        return [_pack_one(weight_NK) for weight_NK in weights_LNK]

    def _linear(self, rows_MK: Tensor, packed_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        if packed_NK.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(rows_MK, packed_NK, bias_N, "none", [], "")
        return functional.linear(rows_MK, packed_NK, bias_N)


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a fast layout for `dtype` on this processor; else a plain copy is multiplied.

    Few processors have one for float16 (AVX512-FP16 or AVX-NE-CONVERT): bfloat16 is the fast half precision elsewhere.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _pack_one(weight_NK: Tensor) -> Tensor:
    if not can_prepack(weight_NK.dtype):
        return weight_NK.detach().clone()
    # Without a hint of the rows oneDNN picks the blocked layout; a hint of one row would leave float32 plain.
    packed_NK = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), None)
    use_huge_pages(torch.ops.mkldnn.data_ptr(packed_NK), torch.ops.mkldnn._nbytes(packed_NK))
    return packed_NK
