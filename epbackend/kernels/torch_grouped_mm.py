"""The kernels with torch's own grouped product: no Triton, and nothing read back from the device.

`torch._grouped_mm` is fast for bfloat16 on Hopper and later. It needs rows of a multiple of 16 bytes, and leaves rows
past the counts uninitialised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import Permuted
from epbackend.kernels.reference import ReferenceKernels, buckets
from epbackend.kernels.weight_formats import Matrices, stacked


class GroupedMmKernels(ReferenceKernels):
    """The reference without its loops over slots. `permute` returns as many rows as there may be choices."""

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        return _count(buckets(slot_ids_TK, slots), slots)

    def permute(
        self,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        slots: int,
        window: tuple[int, int] | None = None,
        expected: int | None = None,
    ) -> Permuted:
        bucket_S = buckets(slot_ids_TK, slots)
        first, last = window or (0, len(bucket_S))
        totals_L = _count(bucket_S, slots)
        ends_L = totals_L.cumsum(0)
        counts_L = ends_L.clamp(first, last) - (ends_L - totals_L).clamp(first, last)
        order_S = bucket_S.argsort(stable=True)[first:last]
        row_S = torch.arange(len(order_S), dtype=torch.int64, device=order_S.device)
        choice_of_row_S = torch.where(row_S < counts_L.sum(), order_S, -1)
        return Permuted(hidden_TD.index_select(0, order_S // slot_ids_TK.shape[1]), counts_L, choice_of_row_S)

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        """Each token looks its rows up: `index_add_` would add them in a different order each time."""
        if len(rows_SD) == 0:
            return
        row_S = torch.arange(len(choice_of_row_S), dtype=torch.int64, device=choice_of_row_S.device)
        row_of = choice_of_row_S.new_full((weights_TK.numel() + 1,), -1)
        row_of[choice_of_row_S] = (
            row_S  # garbage, with choice -1, falls into the last place, which is cut off
        )
        for row_T, weight_T in zip(row_of[:-1].view(weights_TK.shape).T, weights_TK.T, strict=True):
            part_TD = rows_SD[row_T.clamp(min=0)].float() * weight_T.float()[:, None]
            out_TD += torch.where((row_T >= 0)[:, None], part_TD, 0.0)

    def prepack(self, weights_LNK: Matrices) -> Tensor:
        stacked_LNK = stacked(weights_LNK)
        if not isinstance(stacked_LNK, Tensor):
            raise ConfigError("torch._grouped_mm takes no quantized experts; use the kernels triton")
        if (
            stacked_LNK.shape[2] * stacked_LNK.itemsize % 16
            or stacked_LNK.shape[1] * stacked_LNK.itemsize % 16
        ):
            raise ConfigError(
                f"torch._grouped_mm takes widths of a multiple of 16 bytes, and the experts are "
                f"{stacked_LNK.shape[2]} x {stacked_LNK.shape[1]} in {stacked_LNK.dtype}; use the kernels triton"
            )
        return stacked_LNK

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Tensor, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        ends_L = counts_L.cumsum(0).to(torch.int32)
        rows_SN = torch._grouped_mm(rows_SK, packed.transpose(1, 2), ends_L)
        if bias_LN is None:
            return rows_SN
        row_S = torch.arange(len(rows_SK), device=rows_SK.device, dtype=torch.int32)
        slot_S = torch.searchsorted(ends_L, row_S, right=True).clamp(max=len(ends_L) - 1)
        return rows_SN + bias_LN[slot_S]


def _count(bucket_S: Tensor, slots: int) -> Tensor:
    """counts_L without `bincount`, which reads the largest id back."""
    counts = bucket_S.new_zeros(slots + 1)
    return counts.scatter_add_(0, bucket_S, torch.ones_like(bucket_S))[:slots]
