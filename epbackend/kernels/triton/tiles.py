"""Which tile a grouped matmul is cut into."""

from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor
from epbackend.kernels.triton.chip import Chip


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8
    programs: int = 1
    tma: bool = True
    specialize: bool = False
    flatten: bool = False


@dataclass(frozen=True)
class Problem:
    rows: int
    slots: int
    columns: int
    depth: int
    gated: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, rows_SK: Tensor, weight_LNK: Tensor, gated: bool) -> Problem:
        slots, columns, depth = weight_LNK.shape
        return cls(len(rows_SK), slots, columns, depth, gated, weight_LNK.dtype)


def choose_tile(chip: Chip, problem: Problem) -> Tile:
    return Tile(16, 16, 32, 4, 2)
