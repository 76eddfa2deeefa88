"""What each rank keeps for the others to write into: one allocation, shared by all layers of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from epbackend.kernels.triton.peer.mirror import ALIGNMENT, Mirror


@dataclass(frozen=True)
class Geometry:
    """The shapes; the same on all ranks."""

    ranks: int
    slots: int
    """Of each rank."""
    choices: int
    """The most choices that a rank sends at a time."""
    rows: int
    """The most rows that a rank receives at a time."""
    row: tuple[int, torch.dtype]
    """Elements and dtype of a row on its way to the experts."""
    result: tuple[int, torch.dtype]
    """The same of a result on its way back."""

    def fields(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """(shape, dtype) of each buffer, in the order of `Buffers`."""
        return (
            ((self.ranks, self.ranks * self.slots + 1), torch.int32),
            ((self.rows, self.row[0]), self.row[1]),
            ((self.rows,), torch.int64),
            ((self.choices, self.result[0]), self.result[1]),
        )

    @property
    def bytes(self) -> int:
        """Of all buffers of one rank.

        >>> deepseek = 7168, torch.bfloat16
        >>> Geometry(8, 32, choices=128 * 8, rows=8 * 128 * 8, row=deepseek, result=deepseek).bytes >> 20
        126
        """
        return sum(_padded_bytes(*field) for field in self.fields())


@dataclass(frozen=True)
class Buffers:
    """Of one rank, with the addresses of all."""

    table: Mirror
    """int32 [R, P + 1]: of each rank its choices of each slot, and the tokens that it has left."""
    rows: Mirror
    """[C, width of a row]: what arrives for this rank's experts."""
    sources: Mirror
    """int64 [C]: the choice, among all ranks' choices, that a row serves."""
    results: Mirror
    """[T * K, D]: the experts' answers to this rank's choices."""

    @classmethod
    def carve(cls, memory: Mirror, geometry: Geometry) -> Buffers:
        """Lay them out in `memory`, uint8 of `geometry.bytes` on each rank."""
        mirrors, offset = [], 0
        for shape, dtype in geometry.fields():
            mine = _view(memory.mine[offset:], shape, dtype)
            mirrors.append(Mirror(mine, memory.addresses_R + offset))
            offset += _padded_bytes(shape, dtype)
        return cls(*mirrors)


def _view(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _padded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
