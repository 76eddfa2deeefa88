"""W8A8 experts: rows stay in int8 from one product to the next.

With tiled matrices (FRACTAL_NZ) the first product, SwiGLU and the quantisation of its rows are one operator; with plain
ones the product leaves int32 sums, and a second operator does the rest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.kernels import ExpertWeights
from epbackend.kernels.int8 import Int8Rows, Int8Weights
from epbackend.kernels.npu import limits, ops

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiled:
    """The matrices of L slots in the layout that the matrix unit reads."""

    tiles_LKN: Tensor
    """int8, [in, out] each, of format FRACTAL_NZ."""
    scale_LN: Tensor

    def __len__(self) -> int:
        return len(self.tiles_LKN)


Int8Experts = Int8Weights | Tiled
Rows = Tensor | Int8Rows


def tiled(plain: Int8Weights) -> Int8Experts:
    """The matrices in tiles: a copy. As they were where the operators or this CANN do not take them so."""
    if reason := limits.not_tiled(plain):
        log.info("W8A8 experts stay in plain layout: %s", reason)
        return plain
    tiles_LKN = ops.fractal_nz(plain.values_LNK.transpose(1, 2).contiguous())
    if tiles_LKN is None:
        log.warning("W8A8 experts stay in plain layout: torch_npu made no FRACTAL_NZ tensor")
        return plain
    return Tiled(tiles_LKN, plain.scale_LN)


def grouped_matmul(rows_SK: Rows, packed: Int8Experts, counts_L: Tensor, bias_LN: Tensor | None) -> Tensor:
    """rows_SN in the type of the rows."""
    limits.check_int8(rows_SK.dtype, bias_LN)
    if not len(rows_SK):
        return counts_L.new_empty(0, packed.scale_LN.shape[1], dtype=rows_SK.dtype)
    return _scaled(_quantised(rows_SK), packed, counts_L)


def expert_mlp(rows_SD: Rows, counts_L: Tensor, weights: ExpertWeights) -> Tensor:
    """rows_SD: the experts with SwiGLU; S > 0."""
    limits.check_int8(rows_SD.dtype, weights.gate_up_bias_L2F)
    limits.check_int8(rows_SD.dtype, weights.down_bias_LD)
    rows_SF = _gate_up_swiglu(_quantised(rows_SD), weights.gate_up, counts_L)
    return _scaled(rows_SF, weights.down, counts_L)


def _quantised(rows_SK: Rows) -> Int8Rows:
    return rows_SK if isinstance(rows_SK, Int8Rows) else Int8Rows(*ops.dynamic_quant(rows_SK), rows_SK.dtype)


def _gate_up_swiglu(rows: Int8Rows, gate_up: Int8Experts, counts_L: Tensor) -> Int8Rows:
    """rows_SF: quantised again, a scale for each."""
    ends_L = counts_L.cumsum(0)
    if isinstance(gate_up, Tiled):
        values_SF, scale_S = ops.grouped_matmul_swiglu_quant(
            rows.values_SK, rows.scale_S, gate_up.tiles_LKN, gate_up.scale_LN, ends_L
        )
    elif limits.fuses(gate_up):
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
