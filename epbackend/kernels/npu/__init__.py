"""Experts on an Ascend NPU, by the fused operators of torch_npu.

Shapes follow from the shapes of the arguments, and rows past the counts are garbage, so that no call waits for the
device; but for the split `level`, which the host computes.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights, Permuted
from epbackend.kernels.forms import Matrices, stacked
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Rows, Int8Weights
from epbackend.kernels.narrow import TorchNarrowing
from epbackend.kernels.npu import limits, ops, w8a8
from epbackend.kernels.splits import TorchSplits

NpuWeights = Tensor | Int8Weights | w8a8.Tiled  # the plain ones are read through transposed views


class NpuKernels(TorchSplits, TorchNarrowing):
    """See `epbackend.kernels.Kernels` for what each method promises."""

    @cached_property
    def chip(self) -> str:
        """The generation: "A2", "A3", or CANN's own name of another one."""
        name = ops.chip_name()
        generations = {"Ascend910B": "A2", "Ascend910_93": "A3"}
        return next((chip for prefix, chip in generations.items() if name.startswith(prefix)), name)

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        """By comparison: torch.bincount would wait for the device to learn the largest id."""
        slots_L = torch.arange(slots, device=slot_ids_TK.device)
        return (slot_ids_TK.reshape(-1, 1) == slots_L).sum(0)

    def permute(
        self, hidden_TD: Tensor, slot_ids_TK: Tensor, slots: int, window: tuple[int, int] | None = None
    ) -> Permuted:
        """Returns T * K rows, or with a window as many as the window is wide."""
        ids_TK = _or_last(slot_ids_TK, slots)
        if window or not len(hidden_TD):
            return _permute_window(hidden_TD, ids_TK, slots, window or (0, 0))
        rows_SD, source_S, counts_L = ops.init_routing(hidden_TD, ids_TK, slots + 1, active=slots)
        valid_S = torch.arange(len(rows_SD), device=rows_SD.device) < counts_L.sum()
        return Permuted(rows_SD, counts_L, source_S.long().masked_fill(~valid_S, -1))

    def unpermute(self, rows_SD: Tensor, source_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        if not len(rows_SD) or not len(out_TD):
            return
        row_TK = _rows_of_choices(source_S, weights_TK.numel()).view(weights_TK.shape)
        absent_TK = row_TK < 0
        # A choice without a row takes one of its token's own, times 0: another row may be garbage, and 0 * NaN is NaN.
        own_T1 = row_TK.amax(1, keepdim=True)
        row_TK = torch.where(absent_TK, own_T1, row_TK).clamp(min=0)
        weights_TK = weights_TK.float().masked_fill(absent_TK, 0)
        # float32 rows: the operator rounds its sums to the type of the rows.
        sums_TD = ops.token_unpermute(rows_SD.float(), row_TK.reshape(-1), weights_TK)
        out_TD.add_(sums_TD.masked_fill(own_T1 < 0, 0))

    def pack(self, weights_LNK: Matrices) -> NpuWeights:
        """Int8 matrices are copied into tiles where the operators take them (`w8a8`); float ones stay as they are."""
        packed = stacked(weights_LNK)
        if isinstance(packed, Fp8Blocks):
            raise ConfigError(
                "device ascend: float8 experts are not supported; serve this model in bfloat16 or W8A8"
            )
        limits.check_weights(packed)
        return w8a8.tiled(packed) if isinstance(packed, Int8Weights) else packed

    def grouped_matmul(
        self, rows_SK: w8a8.Rows, packed: NpuWeights, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        if not isinstance(packed, Tensor):
            return w8a8.grouped_matmul(rows_SK, packed, counts_L, bias_LN)
        if isinstance(rows_SK, Int8Rows):
            rows_SK = rows_SK.dequantised()
        if not len(rows_SK):
            return rows_SK.new_empty(0, packed.shape[1])
        if bias_LN is not None and rows_SK.dtype == torch.bfloat16:
            bias_LN = bias_LN.float()  # the operator's rule
        return ops.grouped_matmul(rows_SK, packed.transpose(1, 2), counts_L.cumsum(0), bias_LN, rows_SK.dtype)

    def narrow(self, rows_TD: Tensor, values_TD: Tensor, scale_TG: Tensor) -> None:
        if values_TD.dtype != torch.int8 or rows_TD.dtype == torch.float32 or not len(rows_TD):
            return super().narrow(rows_TD, values_TD, scale_TG)  # the operator's rules
        narrow_TD, scale_T = ops.dynamic_quant(rows_TD)
        values_TD.copy_(narrow_TD)
        scale_TG.copy_(scale_T.unsqueeze(1))

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        return ops.swiglu(rows_S2F)

    def expert_mlp(
        self, rows_SD: w8a8.Rows, counts_L: Tensor, weights: ExpertWeights, expected: int | None = None
    ) -> Tensor:
        if not isinstance(weights.gate_up, Tensor) and weights.activation is None and len(rows_SD):
            return w8a8.expert_mlp(rows_SD, counts_L, weights)
        rows_S2F = self.grouped_matmul(rows_SD, weights.gate_up, counts_L, weights.gate_up_bias_L2F)
        rows_SF = (weights.activation or self.swiglu)(rows_S2F)
        return self.grouped_matmul(rows_SF, weights.down, counts_L, weights.down_bias_LD)


def _or_last(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """ids_TK (int32), every id of another rank being `slots`: the operators take no id outside their range."""
    return torch.where((slot_ids_TK >= 0) & (slot_ids_TK < slots), slot_ids_TK, slots).int()


def _permute_window(hidden_TD: Tensor, ids_TK: Tensor, slots: int, window: tuple[int, int]) -> Permuted:
    """The sorted rows from window[0] to window[1]: the fused operator would expand all rows first."""
    first, last = window
    ids_S = ids_TK.reshape(-1)
    order_S = ids_S.float().argsort(stable=True)[first:last]  # NPUs leave integers to their CPU
    ends_L = (ids_S.unsqueeze(1) <= torch.arange(slots, device=ids_S.device)).sum(0)
    counts_L = ends_L.clamp(first, last).diff(prepend=ends_L.new_full((1,), first))
    source_S = order_S.masked_fill(ids_S[order_S] == slots, -1)
    return Permuted(hidden_TD.index_select(0, order_S // ids_TK.shape[1]), counts_L, source_S)


def _rows_of_choices(source_S: Tensor, choices: int) -> Tensor:
    """The inverse of source_S: row_J (int32) for each of J choices, -1 where it has none."""
    row_J = torch.full((choices + 1,), -1, dtype=torch.int32, device=source_S.device)
    rows_S = torch.arange(len(source_S), dtype=torch.int32, device=source_S.device)
    place_S = source_S.masked_fill(source_S < 0, choices)  # garbage rows share the last place
    return row_J.scatter_(0, place_S, rows_S)[:choices]
