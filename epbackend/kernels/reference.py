"""The kernels in plain torch: the oracle of every other implementation, right on any device.

Example of `permute`, two local slots, three tokens with two choices each (9 is a slot of another rank):

    slot_ids_TK     = [[1, 9], [0, 1], [9, 0]]
    choice_of_row_S = [2, 5, 0, 3]     # slot 0 serves token 1 choice 0 and token 2 choice 1; slot 1 tokens 0 and 1
    counts_L        = [2, 2]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from epbackend.kernels import ExpertWeights, Kernels, Permuted, Prepacked, Rows, fp8, int8, renormalized
from epbackend.kernels.replica_split import TorchSplits
from epbackend.kernels.weight_formats import Matrices, SlotMemory, stacked


class TorchQuantization:
    """`quantize` and `dequantize` of `epbackend.kernels.Kernels`, for devices without kernels of their own for them."""

    def quantize(self, rows_TD: Tensor, values_TD: Tensor, scale_TB: Tensor) -> None:
        if values_TD.dtype == fp8.FP8:
            quantized_TD, found_TB = fp8.quantize_rows(rows_TD)
        else:
            quantized_TD, scale_T = int8.quantize_rows(rows_TD)
            found_TB = scale_T.unsqueeze(1)
        values_TD.copy_(quantized_TD)
        scale_TB.copy_(found_TB)

    def dequantize(self, values_TD: Tensor, scale_TB: Tensor, out_TD: Tensor) -> None:
        if values_TD.dtype == fp8.FP8:
            scale_TB = scale_TB.repeat_interleave(fp8.BLOCK, 1)[:, : values_TD.shape[1]]
        out_TD.copy_(values_TD.float() * scale_TB)


class SummedByUnpermute:
    """`weighted_sums` of `epbackend.kernels.Kernels`, for devices whose `unpermute` is all that it takes."""

    def weighted_sums(
        self: Kernels,
        rows_SD: Tensor,
        permuted: Permuted,
        weights_TK: Tensor,
        dtype: torch.dtype,
        renormalize: bool = False,
    ) -> Tensor:
        if renormalize:
            weights_TK = renormalized(weights_TK)
        sums_TD = rows_SD.new_zeros(len(weights_TK), rows_SD.shape[1], dtype=torch.float32)
        self.unpermute(rows_SD, permuted.choice_of_row_S, weights_TK, sums_TD)
        return sums_TD.to(dtype)


class TwoProducts:
    """`prepare` and `expert_mlp` of `epbackend.kernels.Kernels`, by two calls of its `grouped_matmul`."""

    def prepare(self, weights: ExpertWeights) -> None:
        """Nothing follows from weights alone."""

    def expert_mlp(
        self: Kernels,
        rows_SD: Rows,
        counts_L: Tensor,
        weights: ExpertWeights,
        expected: int | None = None,
        total_L: Tensor | None = None,
    ) -> Tensor:
        if total_L is not None:
            total_L += counts_L
        rows_S2F = self.grouped_matmul(rows_SD, weights.gate_up, counts_L, weights.gate_up_bias_L2F)
        rows_SF = (weights.activation or self.swiglu)(rows_S2F)
        return self.grouped_matmul(rows_SF, weights.down, counts_L, weights.down_bias_LD)


class ReferenceKernels(TorchSplits, TorchQuantization, SummedByUnpermute, TwoProducts, SlotMemory):
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        return torch.bincount(buckets(slot_ids_TK, slots), minlength=slots + 1)[:slots]

    def permute(
        self,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        slots: int,
        window: tuple[int, int] | None = None,
        expected: int | None = None,
    ) -> Permuted:
        bucket_S = buckets(slot_ids_TK, slots)
        counts_L = torch.bincount(bucket_S, minlength=slots + 1)[:slots]
        ends_L = counts_L.cumsum(0)
        total = int(ends_L[-1])
        first, last = window or (0, total)
        choice_of_row_S = bucket_S.argsort(stable=True)[first : min(last, total)]
        if window:
            counts_L = ends_L.clamp(first, last) - (ends_L - counts_L).clamp(first, last)
        return Permuted(
            hidden_TD.index_select(0, choice_of_row_S // slot_ids_TK.shape[1]), counts_L, choice_of_row_S
        )

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        if len(choice_of_row_S) and int(choice_of_row_S.min()) < 0:
            valid_S = choice_of_row_S >= 0
            rows_SD, choice_of_row_S = rows_SD[valid_S], choice_of_row_S[valid_S]
        weight_S1 = weights_TK.take(choice_of_row_S).float().unsqueeze(1)
        out_TD.index_add_(0, choice_of_row_S // weights_TK.shape[1], rows_SD.float() * weight_S1)

    def prepack(self, weights_LNK: Matrices) -> Prepacked:
        return stacked(weights_LNK)

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Prepacked, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        if isinstance(packed, int8.Int8Weights):
            return int8.grouped_matmul(rows_SK, packed, counts_L, bias_LN)
        if isinstance(packed, fp8.Fp8Blocks):
            return fp8.grouped_matmul(rows_SK, packed, counts_L, bias_LN)
        rows_SN = rows_SK.new_empty(rows_SK.shape[0], packed[0].shape[0])
        first = 0
        for slot, count in enumerate(counts_L.tolist()):
            if count:
                rows = slice(first, first + count)
                bias_N = None if bias_LN is None else bias_LN[slot]
                rows_SN[rows] = functional.linear(rows_SK[rows], packed[slot], bias_N)
                first += count
        return rows_SN

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        gate_SF, up_SF = rows_S2F.chunk(2, dim=-1)
        return functional.silu(gate_SF).mul_(up_SF)


def buckets(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """Flat slot ids; every id of another rank becomes `slots`, so that it sorts last."""
    flat_S = slot_ids_TK.reshape(-1)
    return torch.where(flat_S // slots == 0, flat_S, slots)
