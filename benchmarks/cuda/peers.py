"""The same experts computed by others: torch's grouped product, and a cuBLAS call for each expert.

Each takes rows that are sorted already, and returns rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from epbackend.kernels import ExpertWeights


def grouped_mm(rows_SD: Tensor, counts_L: Tensor, weights: ExpertWeights) -> Tensor:
    """`torch._grouped_mm`, counts on the device."""
    ends_L = counts_L.cumsum(0).to(torch.int32)
    gate_SF, up_SF = torch._grouped_mm(rows_SD, weights.gate_up.transpose(1, 2), ends_L).chunk(2, -1)
    return torch._grouped_mm(functional.silu(gate_SF) * up_SF, weights.down.transpose(1, 2), ends_L)


def cublas_loop(counts: list[int]) -> Callable[[Tensor, Tensor, ExpertWeights], Tensor]:
    """One product after the other; it is told the counts, which a real layer would have to read back."""

    def loop(rows_SD: Tensor, counts_L: Tensor, weights: ExpertWeights) -> Tensor:
        out_SD = torch.empty_like(rows_SD)
        first = 0
        for slot, count in enumerate(counts):
            rows = slice(first, first + count)
            if count:
                gate, up = functional.linear(rows_SD[rows], weights.gate_up[slot]).chunk(2, -1)
                torch.mm(functional.silu(gate) * up, weights.down[slot].T, out=out_SD[rows])
                first += count
        return out_SD

    return loop
