"""Weight formats: what experts may be given as, plain or quantized, all slots at once or matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from epbackend.errors import ConfigError, UnavailableError
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Matrix, Int8Weights

Experts = Tensor | Fp8Blocks | Int8Weights
"""The matrices [N, K] of L slots at once: one tensor [L, N, K], or quantized."""

Matrices = Experts | Iterable[Tensor | Int8Matrix]
"""The same, or one matrix after the other, all of one format."""


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels multiply that is not quantized."""


def check_float(dtype: torch.dtype, device: str) -> None:
    """Check that experts given as plain tensors can be multiplied.

    Raises:
        ConfigError: They are of integers, or of floats that no kernel takes.
    """
    if dtype not in FLOATS:
        raise ConfigError(
            f"experts are {dtype}, but device {device} multiplies {', '.join(map(str, FLOATS))}; convert "
            "them, or quantize them (epbackend.kernels.int8, epbackend.kernels.fp8)"
        )


def check_width(rows_SK: Tensor, depth: int) -> None:
    """Check that rows are as wide as the matrices that they are multiplied with.

    Raises:
        ConfigError: They are not.
    """
    if rows_SK.shape[1] != depth:
        raise ConfigError(f"rows are {rows_SK.shape[1]} wide, but the experts take {depth}")


def sides(matrices: Matrices) -> tuple[int, int] | None:
    """(N, K) of the matrices; None for an iterable, which does not say before it is used up."""
    if isinstance(matrices, Fp8Blocks | Int8Weights):
        matrices = matrices.values_LNK
    return (matrices.shape[1], matrices.shape[2]) if isinstance(matrices, Tensor) else None


def stacked(matrices: Matrices) -> Experts:
    """All slots at once: in place if contiguous; single matrices side by side, in new memory."""
    if isinstance(matrices, Tensor):
        return matrices.detach().contiguous()
    if isinstance(matrices, Fp8Blocks):
        return Fp8Blocks(matrices.values_LNK.contiguous(), matrices.scale_LBB.contiguous())
    if isinstance(matrices, Int8Weights):
        return Int8Weights(matrices.values_LNK.contiguous(), matrices.scale_LN.contiguous())
    each_L = list(matrices)
    if not isinstance(each_L[0], Int8Matrix):
        return torch.stack(each_L)
    values_LNK = torch.stack([each.values_NK for each in each_L])
    return Int8Weights(values_LNK, torch.stack([each.scale_N.float() for each in each_L]))


class SlotMemory:
    """`slot_memory` and `slot_layout` of `epbackend.kernels.Kernels`, where experts are kept as they are given."""

    def slot_memory(self, packed: Any, slot: int) -> list[Tensor]:
        parts: tuple[Tensor, ...]
        if isinstance(packed, Fp8Blocks):
            parts = packed.values_LNK, packed.scale_LBB
        elif isinstance(packed, Int8Weights):
            parts = packed.values_LNK, packed.scale_LN
        elif isinstance(packed, Tensor):
            parts = (packed,)
        else:
            raise UnavailableError(
                f"experts stored as {type(packed).__name__} cannot be replaced one by one: set balance.on: false"
            )
        return [part[slot].view(-1).view(torch.uint8) for part in parts]

    def slot_layout(self, packed: Any) -> str:
        return "plain"
