"""Experts' matrices with fewer bits than they were trained in: what is stored, and what it means in plain torch.

`Fp8Blocks` is DeepSeek-V3's own format (`weight` and `weight_scale_inv` of its checkpoints), `Int8Rows` the W8A8 of
LMDeploy's `lite smooth_quant`. Rows are quantised as they come: to float8 with one scale for each 128 values, to int8
with one scale for each row. L slots, N outputs, K inputs, B = 128-wide blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from epbackend.errors import ConfigError

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX, INT8_MAX = 448.0, 127.0


@dataclass(frozen=True)
class Fp8Blocks:
    """Matrices of float8_e4m3fn, one float32 scale for each block of 128 x 128."""

    weight_LNK: Tensor
    scale_LBB: Tensor
    """[L, ceil(N / 128), ceil(K / 128)]: real value = float8 value * scale of its block."""

    def __post_init__(self) -> None:
        slots, columns, depth = self.weight_LNK.shape
        expected = (slots, -(-columns // BLOCK), -(-depth // BLOCK))
        if self.weight_LNK.dtype != FP8 or self.scale_LBB.shape != expected:
            raise ConfigError(
                f"fp8 experts need {FP8} weights and scales of shape {list(expected)}, one for each 128 x 128 block; "
                f"these are {self.weight_LNK.dtype} with scales of shape {list(self.scale_LBB.shape)}"
            )

    @classmethod
    def of(cls, weight_LNK: Tensor) -> Fp8Blocks:
        """Quantise full-precision matrices."""
        slots, columns, depth = weight_LNK.shape
        padded = pad(weight_LNK.float(), (0, -depth % BLOCK, 0, -columns % BLOCK))
        blocks = padded.view(slots, padded.shape[1] // BLOCK, BLOCK, padded.shape[2] // BLOCK, BLOCK)
        scale_LBB = scale_of(blocks.abs().amax((2, 4)), FP8_MAX)
        scaled = (blocks / scale_LBB[:, :, None, :, None]).view(padded.shape)
        return cls(scaled[:, :columns, :depth].to(FP8).contiguous(), scale_LBB)

    def dequantised(self) -> Tensor:
        """The matrices that these stand for (float32 [L, N, K])."""
        _, columns, depth = self.weight_LNK.shape
        scale_LNK = self.scale_LBB.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return self.weight_LNK.float() * scale_LNK[:, :columns, :depth]


@dataclass(frozen=True)
class Int8Rows:
    """Matrices of int8, one float32 scale for each output."""

    weight_LNK: Tensor
    scale_LN: Tensor

    def __post_init__(self) -> None:
        if self.weight_LNK.dtype != torch.int8 or self.scale_LN.shape != self.weight_LNK.shape[:2]:
            raise ConfigError(
                f"int8 experts need torch.int8 weights and scales of shape {list(self.weight_LNK.shape[:2])}, one for "
                f"each output; these are {self.weight_LNK.dtype} with scales of shape {list(self.scale_LN.shape)}"
            )

    @classmethod
    def of(cls, weight_LNK: Tensor) -> Int8Rows:
        """Quantise full-precision matrices."""
        scale_LN = scale_of(weight_LNK.float().abs().amax(2), INT8_MAX)
        return cls((weight_LNK.float() / scale_LN[:, :, None]).round().to(torch.int8), scale_LN)

    def dequantised(self) -> Tensor:
        """The matrices that these stand for (float32 [L, N, K])."""
        return self.weight_LNK.float() * self.scale_LN[:, :, None]


def scale_of(largest: Tensor, limit: float) -> Tensor:
    """What brings `largest` to `limit`; 1 where all values are zero."""
    return torch.where(largest > 0, largest / limit, 1.0).float()
