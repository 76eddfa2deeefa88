"""W8A8: int8 weights with a scale for each output channel, int8 rows with a scale each, found when they arrive.

    row ~ q_row * scale_S,  weight ~ q_weight * scale_N,  so  row @ weight.T ~ (q_row @ q_weight.T) * scale_S * scale_N

Where kernels take matrices, `Int8Weights` may stand for those of all slots, or an `Int8Matrix` for each: the products
then run in int8, under the same signatures.

Shapes: L slots, N outputs, K inputs, H = L * N, S rows, M rows of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.errors import ConfigError

LARGEST = 127  # symmetric: -128 is not used


@dataclass(frozen=True)
class Int8Matrix:
    """One expert's [out, in] matrix: values_NK * scale_N."""

    values_NK: Tensor
    scale_N: Tensor
    """float32, positive."""

    @classmethod
    def of(cls, weight_NK: Tensor) -> Int8Matrix:
        """A float matrix, quantized."""
        values_NK, scale_N = quantize_rows(weight_NK)
        return cls(values_NK, scale_N)


@dataclass(frozen=True)
class Int8Weights:
    """The matrices of L slots."""

    values_LNK: Tensor
    scale_LN: Tensor
    """float32, positive."""

    def __post_init__(self) -> None:
        expected = self.values_LNK.shape[:2]
        if (self.values_LNK.dtype, self.scale_LN.dtype, self.scale_LN.shape) != (
            torch.int8,
            torch.float32,
            expected,
        ):
            raise ConfigError(
                f"int8 experts need torch.int8 values and torch.float32 scales of shape {list(expected)}, one for each "
                f"output; these are {self.values_LNK.dtype} with scales of shape {list(self.scale_LN.shape)} in "
                f"{self.scale_LN.dtype}"
            )

    def __len__(self) -> int:
        return len(self.values_LNK)

    @classmethod
    def of(cls, weight_LNK: Tensor) -> Int8Weights:
        """Float matrices, quantized."""
        values_HK, scale_H = quantize_rows(weight_LNK.flatten(0, 1))
        return cls(values_HK.view(weight_LNK.shape), scale_H.view(weight_LNK.shape[:2]))

    def dequantized(self) -> Tensor:
        """The matrices that these stand for (float32 [L, N, K])."""
        return self.values_LNK.float() * self.scale_LN.unsqueeze(2)


@dataclass(frozen=True)
class Int8Rows:
    """Rows that arrive quantized: values_SK * scale_S, as `quantize_rows` makes them."""

    values_SK: Tensor
    scale_S: Tensor
    """float32."""
    dtype: torch.dtype
    """Of the rows before they were quantized, and of what is computed from them."""

    def __len__(self) -> int:
        return len(self.values_SK)

    def dequantized(self) -> Tensor:
        """The rows that these stand for, in their own type."""
        return (self.values_SK * self.scale_S.unsqueeze(1)).to(self.dtype)


def quantize_rows(rows_SK: Tensor) -> tuple[Tensor, Tensor]:
    """(values_SK int8, scale_S float32): each row divided by its scale, the largest value of a row becoming 127.

    [[1.0, -2.0]] -> [[64, -127]], [2 / 127]
    """
    scale_S = rows_SK.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    values_SK = (rows_SK.float() / scale_S.unsqueeze(1)).round().clamp(-LARGEST, LARGEST)
    return values_SK.to(torch.int8), scale_S


def grouped_matmul(
    rows_SK: Tensor, weights: Int8Weights, counts_L: Tensor, bias_LN: Tensor | None = None
) -> Tensor:
    """rows_SN in the type of `rows_SK`: the reference of `Kernels.grouped_matmul` for int8 weights."""
    values_SK, scale_S = quantize_rows(rows_SK)
    rows_SN = rows_SK.new_empty(len(rows_SK), weights.values_LNK.shape[1])
    first = 0
    for slot, count in enumerate(counts_L.tolist()):
        part = slice(first, first + count)
        # Sums of int8 products are integers, which float64 holds exactly.
        sums_MN = values_SK[part].double() @ weights.values_LNK[slot].double().t()
        out_MN = sums_MN * scale_S[part, None] * weights.scale_LN[slot]
        rows_SN[part] = out_MN if bias_LN is None else out_MN + bias_LN[slot]
        first += count
    return rows_SN
