"""Experts in float8, in DeepSeek-V3's own format: `weight` and `weight_scale_inv` of its checkpoints.

Rows are quantized when they arrive, with one scale for each 128 values. Where kernels take matrices, `Fp8Blocks` may
stand for those of all slots.

Shapes: L slots, N outputs, K inputs, S rows, B blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from epbackend.errors import ConfigError

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class Fp8Blocks:
    """Matrices of float8_e4m3fn, one float32 scale for each block of 128 x 128."""

    values_LNK: Tensor
    scale_LBB: Tensor
    """[L, ceil(N / 128), ceil(K / 128)]: real value = float8 value * scale of its block."""

    def __post_init__(self) -> None:
        slots, columns, depth = self.values_LNK.shape
        expected = (slots, -(-columns // BLOCK), -(-depth // BLOCK))
        if (self.values_LNK.dtype, self.scale_LBB.dtype, self.scale_LBB.shape) != (
            FP8,
            torch.float32,
            expected,
        ):
            raise ConfigError(
                f"fp8 experts need {FP8} weights and torch.float32 scales of shape {list(expected)}, one for each "
                f"128 x 128 block; these are {self.values_LNK.dtype} with scales of shape "
                f"{list(self.scale_LBB.shape)} in {self.scale_LBB.dtype}"
            )

    def __len__(self) -> int:
        return len(self.values_LNK)

    @classmethod
    def of(cls, weight_LNK: Tensor) -> Fp8Blocks:
        """Quantize full-precision matrices."""
        slots, columns, depth = weight_LNK.shape
        padded = pad(weight_LNK.float(), (0, -depth % BLOCK, 0, -columns % BLOCK))
        blocks = padded.view(slots, padded.shape[1] // BLOCK, BLOCK, padded.shape[2] // BLOCK, BLOCK)
        largest_LBB = blocks.abs().amax((2, 4))
        scale_LBB = torch.where(largest_LBB > 0, largest_LBB / FP8_MAX, 1.0)
        scaled = (blocks / scale_LBB[:, :, None, :, None]).view(padded.shape)
        return cls(scaled[:, :columns, :depth].to(FP8).contiguous(), scale_LBB)

    def dequantized(self) -> Tensor:
        """The matrices that these stand for (float32 [L, N, K])."""
        _, columns, depth = self.values_LNK.shape
        scale_LNK = self.scale_LBB.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return self.values_LNK.float() * scale_LNK[:, :columns, :depth]


def quantize_rows(rows_SK: Tensor) -> tuple[Tensor, Tensor]:
    """(values_SK float8, scale_SB float32): the largest of each 128 values of a row becomes 448."""
    depth = rows_SK.shape[1]
    blocks = pad(rows_SK.float(), (0, -depth % BLOCK)).unflatten(1, (-1, BLOCK))  # [S, B, 128]
    largest_SB = blocks.abs().amax(2)
    scale_SB = torch.where(largest_SB > 0, largest_SB / FP8_MAX, 1.0)
    return (blocks / scale_SB.unsqueeze(2)).flatten(1)[:, :depth].to(FP8), scale_SB


def rounded(rows_SK: Tensor) -> Tensor:
    """Rows (float32) as they are once they were quantized."""
    values_SK, scale_SB = quantize_rows(rows_SK)
    return values_SK.float() * scale_SB.repeat_interleave(BLOCK, 1)[:, : rows_SK.shape[1]]


def grouped_matmul(
    rows_SK: Tensor, weights: Fp8Blocks, counts_L: Tensor, bias_LN: Tensor | None = None
) -> Tensor:
    """rows_SN in the type of `rows_SK`: the reference of `Kernels.grouped_matmul` for float8 weights."""
    rounded_SK = rounded(rows_SK)
    rows_SN = rows_SK.new_empty(len(rows_SK), weights.values_LNK.shape[1])
    first = 0
    for slot, count in enumerate(counts_L.tolist()):
        part, only = slice(first, first + count), slice(slot, slot + 1)
        matrix_NK = Fp8Blocks(weights.values_LNK[only], weights.scale_LBB[only]).dequantized()[0]
        bias_N = None if bias_LN is None else bias_LN[slot].float()
        rows_SN[part] = linear(rounded_SK[part], matrix_NK, bias_N)
        first += count
    return rows_SN
