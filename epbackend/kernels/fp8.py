"""Experts of float8, DeepSeek-V3's own format: `weight` and `weight_scale_inv` of its checkpoints.

Rows are quantised as they come, with one scale for each 128 values. L slots, N outputs, K inputs, B = 128-wide blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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
        if self.values_LNK.dtype != FP8 or self.scale_LBB.shape != expected:
            raise ConfigError(
                f"fp8 experts need {FP8} weights and scales of shape {list(expected)}, one for each 128 x 128 block; "
                f"these are {self.values_LNK.dtype} with scales of shape {list(self.scale_LBB.shape)}"
            )

    @classmethod
    def of(cls, weight_LNK: Tensor) -> Fp8Blocks:
        """Quantise full-precision matrices."""
        slots, columns, depth = weight_LNK.shape
        padded = pad(weight_LNK.float(), (0, -depth % BLOCK, 0, -columns % BLOCK))
        blocks = padded.view(slots, padded.shape[1] // BLOCK, BLOCK, padded.shape[2] // BLOCK, BLOCK)
        largest_LBB = blocks.abs().amax((2, 4))
        scale_LBB = torch.where(largest_LBB > 0, largest_LBB / FP8_MAX, 1.0)
        scaled = (blocks / scale_LBB[:, :, None, :, None]).view(padded.shape)
        return cls(scaled[:, :columns, :depth].to(FP8).contiguous(), scale_LBB)

    def dequantised(self) -> Tensor:
        """The matrices that these stand for (float32 [L, N, K])."""
        _, columns, depth = self.values_LNK.shape
        scale_LNK = self.scale_LBB.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return self.values_LNK.float() * scale_LNK[:, :columns, :depth]
