"""The kernels' contract on an Ascend NPU, by the fused operators of torch_npu (`ops`).

Shapes follow from the shapes of the arguments, and rows past the counts are garbage, so that no call waits for the
device; except the split `level`, which the host computes.

W8A8 experts keep their rows in int8 from one product to the next. With tiled matrices (FRACTAL_NZ) the first product,
SwiGLU and the quantization of its rows are one operator; with plain ones the product leaves int32 sums, and a second
operator does the rest.

Shapes: T tokens, D hidden size, K experts chosen per token, L slots, S rows, F expert width; N outputs and K inputs of
a matrix.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights, Permuted
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Rows, Int8Weights
from epbackend.kernels.npu import ops
from epbackend.kernels.reference import SummedByUnpermute, TorchQuantization, TwoProducts
from epbackend.kernels.replica_split import TorchSplits
from epbackend.kernels.weight_formats import Matrices, SlotMemory, stacked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiled:
    """The int8 matrices of L slots in the layout that the matrix unit reads."""

    tiles_LKN: Tensor
    """int8, [in, out] each, of format FRACTAL_NZ."""
    scale_LN: Tensor

    def __len__(self) -> int:
        return len(self.tiles_LKN)


Int8Experts = Int8Weights | Tiled
Rows = Tensor | Int8Rows


def tiled(plain: Int8Weights) -> Int8Experts:
    """The matrices in tiles, a copy; unchanged where the operators or this CANN do not take them so."""
    if reason := ops.not_tiled(plain):
        log.info("W8A8 experts stay in plain layout: %s", reason)
        return plain
    tiles_LKN = ops.fractal_nz(plain.values_LNK.transpose(1, 2).contiguous())
    if tiles_LKN is None:
        log.warning("W8A8 experts stay in plain layout: torch_npu made no FRACTAL_NZ tensor")
        return plain
    return Tiled(tiles_LKN, plain.scale_LN)


def grouped_matmul(rows_SK: Rows, packed: Int8Experts, counts_L: Tensor, bias_LN: Tensor | None) -> Tensor:
    """rows_SN in the dtype of the rows."""
    ops.check_int8(rows_SK.dtype, bias_LN)
    if not len(rows_SK):
        return counts_L.new_empty(0, packed.scale_LN.shape[1], dtype=rows_SK.dtype)
    return _scaled(_quantized(rows_SK), packed, counts_L)


def expert_mlp(rows_SD: Rows, counts_L: Tensor, weights: ExpertWeights) -> Tensor:
    """rows_SD: the experts with SwiGLU; S > 0."""
    ops.check_int8(rows_SD.dtype, weights.gate_up_bias_L2F)
    ops.check_int8(rows_SD.dtype, weights.down_bias_LD)
    rows_SF = _gate_up_swiglu(_quantized(rows_SD), weights.gate_up, counts_L)
    return _scaled(rows_SF, weights.down, counts_L)


def _quantized(rows_SK: Rows) -> Int8Rows:
    return rows_SK if isinstance(rows_SK, Int8Rows) else Int8Rows(*ops.dynamic_quant(rows_SK), rows_SK.dtype)


def _gate_up_swiglu(rows: Int8Rows, gate_up: Int8Experts, counts_L: Tensor) -> Int8Rows:
    """rows_SF: quantized again, with a scale for each row."""
    ends_L = counts_L.cumsum(0)
    if isinstance(gate_up, Tiled):
        values_SF, scale_S = ops.grouped_matmul_swiglu_quant(
            rows.values_SK, rows.scale_S, gate_up.tiles_LKN, gate_up.scale_LN, ends_L
        )
    elif ops.fuses(gate_up):
        sums_S2F = ops.grouped_matmul(rows.values_SK, _weight_LKN(gate_up), ends_L, None, torch.int32)
        values_SF, scale_S = ops.dequant_swiglu_quant(sums_S2F, gate_up.scale_LN, rows.scale_S, counts_L)
    else:
        values_SF, scale_S = ops.dynamic_quant(ops.swiglu(_scaled(rows, gate_up, counts_L)))
    return Int8Rows(values_SF, scale_S, rows.dtype)


def _scaled(rows: Int8Rows, packed: Int8Experts, counts_L: Tensor) -> Tensor:
    return ops.grouped_matmul_scaled(
        rows.values_SK, rows.scale_S, _weight_LKN(packed), packed.scale_LN, counts_L.cumsum(0), rows.dtype
    )


def _weight_LKN(packed: Int8Experts) -> Tensor:
    return packed.tiles_LKN if isinstance(packed, Tiled) else packed.values_LNK.transpose(1, 2)


NpuWeights = Tensor | Int8Weights | Tiled
"""What `prepack` stores; the plain ones are read through transposed views."""


class NpuKernels(TorchSplits, TorchQuantization, SummedByUnpermute, TwoProducts, SlotMemory):
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        """By comparison: torch.bincount would wait for the device to learn the largest id."""
        slots_L = torch.arange(slots, dtype=torch.int64, device=slot_ids_TK.device)
        return (slot_ids_TK.reshape(-1, 1) == slots_L).sum(0)

    def permute(
        self,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        slots: int,
        window: tuple[int, int] | None = None,
        expected: int | None = None,
    ) -> Permuted:
        """Returns T * K rows, or with a window as many as the window is wide."""
        ids_TK = _or_last(slot_ids_TK, slots)
        if window or not len(hidden_TD):
            return _permute_window(hidden_TD, ids_TK, slots, window or (0, 0))
        rows_SD, choice_of_row_S, counts_L = ops.init_routing(hidden_TD, ids_TK, slots + 1, active=slots)
        valid_S = torch.arange(len(rows_SD), dtype=torch.int64, device=rows_SD.device) < counts_L.sum()
        return Permuted(rows_SD, counts_L, choice_of_row_S.long().masked_fill(~valid_S, -1))

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        if not len(rows_SD) or not len(out_TD):
            return
        row_TK = _rows_of_choices(choice_of_row_S, weights_TK.numel()).view(weights_TK.shape)
        absent_TK = row_TK < 0
        # A choice without a row takes one of its token's own, times 0: another row may be garbage, and 0 * NaN is NaN.
        own_T1 = row_TK.amax(1, keepdim=True)
        row_TK = torch.where(absent_TK, own_T1, row_TK).clamp(min=0)
        weights_TK = weights_TK.float().masked_fill(absent_TK, 0)
        # float32 rows: the operator rounds its sums to the type of the rows.
        sums_TD = ops.token_unpermute(rows_SD.float(), row_TK.reshape(-1), weights_TK)
        out_TD.add_(sums_TD.masked_fill(own_T1 < 0, 0))

    def prepack(self, weights_LNK: Matrices) -> NpuWeights:
        """Int8 matrices are copied into tiles where the operators take them; float ones stay as they are."""
        packed = stacked(weights_LNK)
        if isinstance(packed, Fp8Blocks):
            raise ConfigError(
                "device ascend: float8 experts are not supported; serve this model in bfloat16 or W8A8"
            )
        ops.check_weights(packed)
        return tiled(packed) if isinstance(packed, Int8Weights) else packed

    def slot_memory(self, packed: NpuWeights, slot: int) -> list[Tensor]:
        if not isinstance(packed, Tiled):
            return super().slot_memory(packed, slot)
        # The tiles of one matrix lie behind those of the one before.
        tiles = ops.raw_bytes(packed.tiles_LKN).view(len(packed), -1)[slot]
        return [tiles, packed.scale_LN[slot].view(torch.uint8)]

    def slot_layout(self, packed: NpuWeights) -> str:
        return "FRACTAL_NZ" if isinstance(packed, Tiled) else super().slot_layout(packed)

    def grouped_matmul(
        self, rows_SK: Rows, packed: NpuWeights, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        if not isinstance(packed, Tensor):
            return grouped_matmul(rows_SK, packed, counts_L, bias_LN)
        if isinstance(rows_SK, Int8Rows):
            rows_SK = rows_SK.dequantized()
        if not len(rows_SK):
            return rows_SK.new_empty(0, packed.shape[1])
        if bias_LN is not None and rows_SK.dtype == torch.bfloat16:
            bias_LN = bias_LN.float()  # the operator's rule
        return ops.grouped_matmul(rows_SK, packed.transpose(1, 2), counts_L.cumsum(0), bias_LN, rows_SK.dtype)

    def quantize(self, rows_TD: Tensor, values_TD: Tensor, scale_TB: Tensor) -> None:
        if values_TD.dtype != torch.int8 or rows_TD.dtype == torch.float32 or not len(rows_TD):
            return super().quantize(rows_TD, values_TD, scale_TB)  # the operator's rules
        quantized_TD, scale_T = ops.dynamic_quant(rows_TD)
        values_TD.copy_(quantized_TD)
        scale_TB.copy_(scale_T.unsqueeze(1))

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        if not len(rows_S2F):
            return rows_S2F.new_empty(0, rows_S2F.shape[1] // 2)
        return ops.swiglu(rows_S2F)

    def expert_mlp(
        self,
        rows_SD: Rows,
        counts_L: Tensor,
        weights: ExpertWeights,
        expected: int | None = None,
        total_L: Tensor | None = None,
    ) -> Tensor:
        if isinstance(weights.gate_up, Tensor) or weights.activation is not None or not len(rows_SD):
            return super().expert_mlp(rows_SD, counts_L, weights, expected, total_L)
        if total_L is not None:
            total_L += counts_L
        return expert_mlp(rows_SD, counts_L, weights)


def _or_last(slot_ids_TK: Tensor, slots: int) -> Tensor:
    """ids_TK (int32), every id of another rank being `slots`: the operators take no id outside their range."""
    return torch.where((slot_ids_TK >= 0) & (slot_ids_TK < slots), slot_ids_TK, slots).int()


def _permute_window(hidden_TD: Tensor, ids_TK: Tensor, slots: int, window: tuple[int, int]) -> Permuted:
    """The sorted rows from window[0] to window[1]: the fused operator would expand all rows first."""
    first, last = window
    ids_S = ids_TK.reshape(-1)
    order_S = ids_S.float().argsort(stable=True)[first:last]  # NPUs leave integers to their CPU
    ends_L = (ids_S.unsqueeze(1) <= torch.arange(slots, dtype=torch.int64, device=ids_S.device)).sum(0)
    counts_L = ends_L.clamp(first, last).diff(prepend=ends_L.new_full((1,), first))
    choice_of_row_S = order_S.masked_fill(ids_S[order_S] == slots, -1)
    return Permuted(hidden_TD.index_select(0, order_S // ids_TK.shape[1]), counts_L, choice_of_row_S)


def _rows_of_choices(choice_of_row_S: Tensor, choices: int) -> Tensor:
    """The inverse of choice_of_row_S: the row (int32) of each choice, -1 where it has none."""
    row_of = torch.full((choices + 1,), -1, dtype=torch.int32, device=choice_of_row_S.device)
    rows_S = torch.arange(len(choice_of_row_S), dtype=torch.int32, device=choice_of_row_S.device)
    place_S = choice_of_row_S.masked_fill(choice_of_row_S < 0, choices)  # garbage rows share the last place
    return row_of.scatter_(0, place_S, rows_S)[:choices]
