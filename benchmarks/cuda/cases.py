"""What is measured: experts of real models, numbers of tokens, and the figure that each case is to reach."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from epbackend.kernels.fp8 import BLOCK, FP8, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights

BITS = {"half": 16, "fp8": 8, "int8": 8}
LARGEST_ERROR = {"half": 0.01, "int8": 0.03, "fp8": 0.06}
"""Of a right answer, as a share of the reference's norm: what rounding rows to so few bits leaves."""


@dataclass(frozen=True)
class Experts:
    """The routed experts that one GPU holds."""

    model: str
    slots: int
    D: int
    F: int
    top_k: int

    def weights(self, form: str, device: torch.device) -> tuple:
        """(gate_up, down), random, packed in `form`."""
        return (
            _matrices(form, self.slots, 2 * self.F, self.D, device),
            _matrices(form, self.slots, self.D, self.F, device),
        )


QWEN3 = Experts("Qwen3-30B", 128, 2048, 768, 8)
DEEPSEEK = Experts("DeepSeek-V3, 32 of 256", 32, 7168, 2048, 1)
"""One of eight ranks: of a token's eight choices, one falls here on average. `tokens` counts those choices."""


@dataclass(frozen=True)
class Case:
    """One call of the experts: both products and SwiGLU."""

    experts: Experts
    form: str
    tokens: int
    target_tflops: float | None = None
    target_us: float | None = None

    @property
    def name(self) -> str:
        return f"{self.experts.model} {self.form} T={self.tokens}"

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
        matrix = 3 * experts.D * experts.F * BITS[self.form] / 8
        return int((self.counts_L > 0).sum()) * matrix + 2 * 2 * self.rows * experts.D


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


def _matrices(form: str, slots: int, columns: int, depth: int, device: torch.device):
    if form == "half":
        return torch.randn(slots, columns, depth, device=device, dtype=torch.bfloat16) / depth**0.5
    if form == "int8":
        values = torch.randint(-127, 128, (slots, columns, depth), device=device, dtype=torch.int8)
        return Int8Weights(values, torch.full((slots, columns), 1 / (73 * depth**0.5), device=device))
    values = torch.empty(slots, columns, depth, dtype=FP8, device=device)
    for slot in range(slots):
        values[slot] = torch.randn(columns, depth, device=device).to(FP8)
    scales = torch.rand(slots, columns // BLOCK, depth // BLOCK, device=device) / depth**0.5
    return Fp8Blocks(values, scales)
