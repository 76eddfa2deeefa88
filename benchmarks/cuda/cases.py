"""What is measured: experts of real models, numbers of tokens, and the figure that each case is to reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from unittest import mock

import torch
from torch import Tensor

from epbackend.kernels.triton import expert_mlp
from epbackend.kernels.triton.tiles import Chip, Product, Tile, choose_tile
from epbackend.kernels.triton.tuning import BYTES, ExpertShape

QWEN3 = ExpertShape("Qwen3-30B", 128, 2048, 768, 8)
DEEPSEEK = ExpertShape("DeepSeek-V3, 32 of 256", 32, 7168, 2048, 1)
"""One of eight ranks: of a token's eight choices, one falls here on average. `tokens` counts those choices."""


@dataclass(frozen=True)
class Case:
    """One call of the experts: both products and SwiGLU."""

    experts: ExpertShape
    form: str
    tokens: int
    target_tflops: float | None = None
    target_us: float | None = None

    @property
    def name(self) -> str:
        return f"{self.experts.name} {self.form} T={self.tokens}"

    @property
    def rows(self) -> int:
        return self.tokens * self.experts.top_k

    def topk_ids_TK(self, seed: int) -> Tensor:
        """Each token's choices, distinct and equally likely; on the CPU."""
        draw = torch.Generator().manual_seed(seed)
        return torch.rand(self.tokens, self.experts.slots, generator=draw).topk(self.experts.top_k).indices

    @cached_property
    def counts_L(self) -> Tensor:
        """Rows of each slot, with the first seed."""
        return torch.bincount(self.topk_ids_TK(0).flatten(), minlength=self.experts.slots)

    @property
    def flops(self) -> float:
        return 6.0 * self.rows * self.experts.D * self.experts.F

    @property
    def bytes(self) -> float:
        """The least that must move: the chosen experts' weights once, rows in and out."""
        experts = self.experts
        matrix = 3 * experts.D * experts.F * BYTES[self.form]
        return int((self.counts_L > 0).sum()) * matrix + 2 * 2 * self.rows * experts.D


@contextmanager
def gathering() -> Iterator[None]:
    """Inside, layers plan to read the rows of gated products where the tokens lie, whatever the table says.

    A layer plans for a number of rows when it first multiplies so many, and keeps to it.
    """

    def gathered(chip: Chip, product: Product) -> Tile:
        tile = choose_tile(chip, product)
        return replace(tile, gather=product.gated and not tile.specialize)

    with mock.patch.object(expert_mlp, "choose_tile", gathered):
        yield


CASES = (
    Case(QWEN3, "half", 1, target_us=40),
    Case(QWEN3, "half", 16, target_us=310),
    Case(QWEN3, "half", 256, target_us=470),
    Case(QWEN3, "half", 1024),
    Case(QWEN3, "half", 8192, target_tflops=520),
    Case(QWEN3, "half", 32768, target_tflops=520),
    Case(QWEN3, "int8", 256),
    Case(QWEN3, "int8", 32768),
    Case(DEEPSEEK, "half", 32768, target_tflops=640),
    Case(DEEPSEEK, "fp8", 128, target_us=600),
    Case(DEEPSEEK, "fp8", 32768, target_tflops=850),
    Case(DEEPSEEK, "fp8", 65536, target_tflops=850),
)
