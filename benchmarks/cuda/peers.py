"""The same experts computed by others: torch's grouped product, a cuBLAS call for each expert, LMDeploy's own kernels.

Each takes rows that are sorted already and returns rows, except LMDeploy's, which is a whole layer: it sorts and sums.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


def lmdeploy_kernels(folder: Path) -> ModuleType:
    """LMDeploy's `fused_moe` module, from an unpacked wheel; none of the rest of LMDeploy is imported.

    `folder` holds the package `lmdeploy`; `lmdeploy/pytorch/kernels/cuda` is all that is read of it.
    """
    path = folder.resolve()
    for part in ("lmdeploy", "pytorch", "kernels", "cuda", "moe"):
        path = path / part
        name = ".".join(path.relative_to(folder.resolve()).parts)
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    utils = ModuleType("lmdeploy.utils")
    utils.get_logger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules["lmdeploy.utils"] = utils
    return importlib.import_module("lmdeploy.pytorch.kernels.cuda.moe.fused_moe")
