"""The kernels' contract on a GPU: nothing waits for it or is read back, and shapes do not depend on the routing.

So every method can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights, Permuted, Rows
from epbackend.kernels.fp8 import FP8, Fp8Blocks
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.reference import TorchQuantization
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas, Split
from epbackend.kernels.triton import expert_mlp, permute, quantize
from epbackend.kernels.triton.even_split import EvenSplit
from epbackend.kernels.triton.expert_mlp import ExpertMlp, ExpertProduct
from epbackend.kernels.triton.level_split import level_split
from epbackend.kernels.triton.permute import source_of
from epbackend.kernels.triton.tiles import Chip, chip_of, row_tiles, weight_values
from epbackend.kernels.weight_formats import Experts, Matrices, SlotMemory, check_float, stacked
from epbackend.names import FAST_FP8


class TritonKernels(TorchQuantization, SlotMemory):
    """See `epbackend.kernels.Kernels` for what each method promises."""

    def __init__(self, chip: Chip | None = None, *, fast_fp8: bool = False) -> None:
        """`chip` None: the one that a call's tensors are on. `fast_fp8`: sums of float8 products are not promoted."""
        self._chip, self._promote = chip, not fast_fp8
        self._planned: ExpertMlp | None = None

    def count(self, slot_ids_TK: Tensor, slots: int) -> Tensor:
        return permute.count(slot_ids_TK, slots)

    def permute(
        self,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        slots: int,
        window: tuple[int, int] | None = None,
        expected: int | None = None,
    ) -> Permuted:
        copy = True
        if expected is not None and self._planned is not None:
            first, last = window or (0, slot_ids_TK.numel())
            copy = not self._planned.gathers(min(expected, slot_ids_TK.numel() - first, last - first))
        return permute.permute(hidden_TD, slot_ids_TK, slots, window, copy=copy)

    def unpermute(self, rows_SD: Tensor, choice_of_row_S: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        permute.unpermute(rows_SD, choice_of_row_S, weights_TK, out_TD)

    def weighted_sums(
        self,
        rows_SD: Tensor,
        permuted: Permuted,
        weights_TK: Tensor,
        dtype: torch.dtype,
        renormalize: bool = False,
    ) -> Tensor:
        return permute.weighted_sums(rows_SD, permuted, weights_TK, dtype, renormalize)

    def quantize(self, rows_TD: Tensor, values_TD: Tensor, scale_TB: Tensor) -> None:
        by = quantize.quantize if self._converts(values_TD) else super().quantize
        by(rows_TD, values_TD, scale_TB)

    def dequantize(self, values_TD: Tensor, scale_TB: Tensor, out_TD: Tensor) -> None:
        by = quantize.dequantize if self._converts(values_TD) else super().dequantize
        by(values_TD, scale_TB, out_TD)

    def swiglu(self, rows_S2F: Tensor) -> Tensor:
        return expert_mlp.swiglu(rows_S2F)

    def prepack(self, weights_LNK: Matrices) -> Experts:
        """In LMDeploy's layout; a contiguous tensor and whole quantized formats are used in place."""
        packed = stacked(weights_LNK)
        if not self._promote and not isinstance(packed, Fp8Blocks):
            raise ConfigError(
                f"kernels: {FAST_FP8} is for experts in float8, which these are not; write triton"
            )
        if not isinstance(packed, Tensor):
            return packed
        check_float(packed.dtype, "cuda")
        return packed

    def prepare(self, weights: ExpertWeights) -> None:
        device = weight_values(weights.gate_up).device
        check_is_current(device)
        self._planned = ExpertMlp(self._chip or chip_of(device), weights, self._promote)

    def grouped_matmul(
        self, rows_SK: Tensor, packed: Experts, counts_L: Tensor, bias_LN: Tensor | None = None
    ) -> Tensor:
        product = ExpertProduct(self._chip_of(rows_SK), packed, bias_LN, gated=False, promote=self._promote)
        matmul, tile = product.cut(len(rows_SK))
        rows_SN = product.multiply(
            matmul, rows_SK, row_tiles(counts_L, len(rows_SK), tile.rows), rows_SK.dtype
        )
        assert isinstance(rows_SN, Tensor)
        return rows_SN

    def expert_mlp(
        self,
        rows_SD: Rows,
        counts_L: Tensor,
        weights: ExpertWeights,
        expected: int | None = None,
        total_L: Tensor | None = None,
    ) -> Tensor:
        planned = self._planned
        if planned is None or planned.weights is not weights:
            # Of no layer: each of these has kernels of its own (`Device.kernel_set`), and has prepared them.
            planned = self._planned = ExpertMlp(self._chip_of(source_of(rows_SD)[0]), weights, self._promote)
        return planned(rows_SD, counts_L, expected, total_L)

    def even_split(
        self, replicas: EvenReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> Split:
        return EvenSplit(replicas, device, id_check)

    def level_split(
        self, replicas: LevelReplicas, device: torch.device, id_check: ExpertIdCheck | None
    ) -> Split:
        return level_split(replicas, device, id_check, self._chip)

    def _converts(self, values_TD: Tensor) -> bool:
        """Whether the chip converts to and from the values' dtype; torch does for float8 on any chip."""
        return values_TD.dtype != FP8 or self._chip_of(values_TD).fp8

    def _chip_of(self, tensor: Tensor) -> Chip:
        return self._chip or chip_of(tensor.device)


def check_is_current(device: torch.device) -> None:
    """Check that Triton, which launches on the current GPU, would launch where the experts lie.

    Raises:
        ConfigError: It would not.
    """
    if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise ConfigError(
            f"experts lie on {device}, but the current device of this process is cuda:{current}; call "
            f"torch.cuda.set_device({device.index}) before anything is put there"
        )
