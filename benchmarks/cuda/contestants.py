"""Who computes a case: our kernels, their peers, and plain float32 as the judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda import peers
from benchmarks.cuda.cases import Case
from benchmarks.cuda.lmdeploy import LMDeploy
from epbackend.kernels import ExpertWeights, Permuted
from epbackend.kernels.reference import ReferenceKernels
from epbackend.kernels.triton.kernels import TritonKernels

ROUTINGS = 4
"""Different choices of experts that take turns, so that a small case does not run from the L2 cache."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case: rows of the experts, or the whole layer with sorting and summing."""

    name: str
    compute: Callable[[int], Tensor]
    """With the data of one routing."""
    expected: Tensor
    """What `compute(0)` should be."""

    def error(self) -> float:
        """Distance from the right answer, as a share of its norm."""
        return float((self.compute(0).float() - self.expected).norm() / self.expected.norm())


def contestants(case: Case, device: torch.device, lmdeploy: LMDeploy | None = None) -> list[Contestant]:
    """All that can compute `case`, on the same data; LMDeploy's layer if it was brought along."""
    kernels, experts = TritonKernels(), case.experts
    weights = ExpertWeights(*experts.weights(case.form, device))
    hidden_TD = torch.randn(case.tokens, experts.D, device=device, dtype=torch.bfloat16)
    ids = [case.topk_ids_TK(seed).to(device) for seed in range(ROUTINGS)]
    weights_TK = torch.full(ids[0].shape, 1 / experts.top_k, device=device)
    sorted_rows = [kernels.permute(hidden_TD, ids_TK, experts.slots) for ids_TK in ids]
    expected_SD = reference(sorted_rows[0], weights)
    expected_TD = torch.zeros(hidden_TD.shape, device=device)
    ReferenceKernels().unpermute(expected_SD, sorted_rows[0].choice_of_row_S, weights_TK, expected_TD)

    def layer(n: int) -> Tensor:
        permuted = kernels.permute(hidden_TD, ids[n], experts.slots, expected=case.rows)
        rows_SD = kernels.expert_mlp(permuted.rows_SD, permuted.counts_L, weights, case.rows)
        return kernels.weighted_sums(rows_SD, permuted, weights_TK, hidden_TD.dtype)

    def by(compute: Callable[[Tensor, Tensor, ExpertWeights], Tensor], n: int) -> Tensor:
        return compute(sorted_rows[n].rows_SD, sorted_rows[n].counts_L, weights)

    found = [
        Contestant("epbackend", lambda n: by(kernels.expert_mlp, n), expected_SD),
        Contestant("epbackend, layer", layer, expected_TD),
    ]
    if case.form == "half":
        loops = [peers.cublas_loop(each.counts_L.tolist()) for each in sorted_rows]
        found.append(Contestant("torch._grouped_mm", lambda n: by(peers.grouped_mm, n), expected_SD))
        found.append(Contestant("cuBLAS loop", lambda n: by(loops[n], n), expected_SD))
    if case.form == "fp8":
        fast = TritonKernels(fast_fp8=True)
        found.append(Contestant("epbackend, fast fp8", lambda n: by(fast.expert_mlp, n), expected_SD))
    if lmdeploy and case.form in ("half", "fp8"):
        theirs = lmdeploy.half if case.form == "half" else lmdeploy.fp8
        found.append(
            Contestant(
                "LMDeploy, layer", lambda n: theirs(hidden_TD, weights, weights_TK, ids[n]), expected_TD
            )
        )
    return found


def reference(permuted: Permuted, weights: ExpertWeights) -> Tensor:
    """rows_SD in float32, one expert at a time, so that no second copy of all weights is needed."""
    out_SD = torch.empty_like(permuted.rows_SD, dtype=torch.float32)
    first = 0
    for slot, count in enumerate(permuted.counts_L.tolist()):
        one = ExpertWeights(_full(weights.gate_up, slot), _full(weights.down, slot))
        rows = permuted.rows_SD[first : first + count].float()
        out_SD[first : first + count] = ReferenceKernels().expert_mlp(rows, torch.tensor([count]), one)
        first += count
    return out_SD


def _full(experts: Any, slot: int) -> Tensor:
    """One slot's matrix [1, N, K] in float32."""
    if isinstance(experts, Tensor):
        return experts[slot : slot + 1].float()
    return type(experts)(*(each[slot : slot + 1] for each in vars(experts).values())).dequantized()
