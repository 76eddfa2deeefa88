"""The kernels' contract on a GPU: everything stays on the device, shapes do not depend on the routing.

Every method can be captured in a CUDA graph: none waits for the GPU or reads anything back from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights, Permuted
from epbackend.kernels.fp8 import FP8
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.narrow import TorchNarrowing
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.kernels.triton import expert_mlp, permute, quantize, replica_split
from epbackend.kernels.triton.expert_mlp import Products, check_same_form
from epbackend.kernels.triton.tiles import Chip, chip_of
from epbackend.kernels.weight_formats import Experts, Matrices, stacked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonKernels(TorchNarrowing):
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def __init__(self, chip: Chip | None = None) -> None:
        """`chip` None: the one that a call's tensors live on."""
        self._chip = chip

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        return permute.count(slot_ids_TK, slots)

    def permute(
        self, hidden_TD: Tensor, slot_ids_TK: Tensor, slots: int, window: tuple[int, int] | None = None
    ) -> Permuted:
        return permute.permute(hidden_TD, slot_ids_TK, slots, window)

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        permute.unpermute(rows_SD, choice_of_row_S, weights_TK, out_TD)

    def narrow(self, rows_TD: Tensor, values_TD: Tensor, scale_TG: Tensor) -> None:
        by = quantize.narrow if self._converts(values_TD) else super().narrow
        by(rows_TD, values_TD, scale_TG)

    def widen(self, values_TD: Tensor, scale_TG: Tensor, out_TD: Tensor) -> None:
        by = quantize.widen if self._converts(values_TD) else super().widen
        by(values_TD, scale_TG, out_TD)

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        return expert_mlp.swiglu(rows_S2F)

    def pack(self, weights_LNK: Matrices) -> Experts:
        """Stacked as LMDeploy lays them; a contiguous tensor and quantized matrices are used where they are."""
        packed = stacked(weights_LNK)
        if not isinstance(packed, Tensor):
            return packed
        if packed.dtype not in DTYPES:
            raise ConfigError(
                f"experts are {packed.dtype}, but device cuda multiplies {', '.join(map(str, DTYPES))}; convert "
                "them, or quantize them (epbackend.kernels.int8, epbackend.kernels.fp8)"
            )
        return packed

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Experts, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        return self._products(rows_SK, counts_L).plain(rows_SK, packed, bias_LN)

    def expert_mlp(
        self, rows_SD: Tensor, counts_L: Tensor, weights: ExpertWeights, expected: int | None = None
    ) -> Tensor:
        check_same_form(weights.gate_up, weights.down)
        products = self._products(rows_SD, counts_L, expected)
        if weights.activation is None:
            rows_SF = products.gated(rows_SD, weights.gate_up, weights.gate_up_bias_L2F)
        else:
            rows_SF = weights.activation(products.plain(rows_SD, weights.gate_up, weights.gate_up_bias_L2F))
        return products.plain(rows_SF, weights.down, weights.down_bias_LD)

    def even_split(self, replicas: EvenReplicas, device: torch.device, guard: ExpertIdCheck | None) -> Split:
        return replica_split.EvenSplit(replicas, device, guard)

    def level_split(
        self, replicas: LevelReplicas, device: torch.device, guard: ExpertIdCheck | None
    ) -> Split:
        return replica_split.level_split(replicas, device, guard, self._chip)

    def _converts(self, values_TD: Tensor) -> bool:
        """Whether the chip knows the values' dtype; torch converts to and from float8 on any."""
        return values_TD.dtype != FP8 or (self._chip or chip_of(values_TD.device)).fp8

    def _products(self, rows_SD: Tensor, counts_L: Tensor, expected: int | None = None) -> Products:
        return Products(self._chip or chip_of(rows_SD.device), rows_SD, counts_L, expected)
