"""From tokens to the weighted sums of this rank's experts: the local half that all dispatchers share.

The cutoff (MindIE's `topk_scaling_factor`) bounds the expanded rows that exist at one time. MindIE drops the rows past
the bound; here they go through a further pass, so the result is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Problem
from epbackend.dispatch.settings import DispatchSettings
from epbackend.errors import ConfigError


def kept_choices(top_k: int, factor: float) -> int:
    """MindIE's `int(top_k * factor)`: the choices of each token that the bound leaves room for; at least 1."""
    kept = int(top_k * factor)
    if kept < 1:
        smallest = ceil(Fraction(1000, top_k)) / 1000
        raise ConfigError(
            f"topk_scaling_factor {factor} leaves no room for any of the {top_k} experts of a token "
            f"(int({top_k} * {factor}) is 0); the smallest factor that works here is {smallest}"
        )
    return kept


def row_bound(tokens: int, top_k: int, settings: DispatchSettings) -> int:
    """The most expanded rows that one pass over `tokens` gathered tokens may hold."""
    everything = tokens * top_k
    if settings.topk_scaling_factor is None:
        return everything
    kept = kept_choices(top_k, settings.topk_scaling_factor)
    return min(everything, max(tokens, settings.cutoff_min_tokens) * kept)


class LocalRows:
    """N tokens in, rows for this rank's slots out, weighted float32 sums collected in `out_ND`."""

    def __init__(self, problem: Problem, hidden_ND: Tensor, slot_ids_NK: Tensor, weights_NK: Tensor,
                 bound: int | None = None) -> None:
        """`slot_ids_NK` name slots of all ranks; `bound` is the most rows of a pass, None for all in one."""
        self._kernels, self._slots = problem.kernels, problem.slots
        self._hidden_ND, self._weights_NK = hidden_ND, weights_NK
        self._slot_ids_NK = slot_ids_NK - problem.ranks.rank * problem.slots
        self._bound = bound if bound is not None and bound < slot_ids_NK.numel() else None
        self.out_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device)
        self.passes = 1

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """One batch a pass; a single one unless the rows of this rank exceed the bound."""
        if self._bound is None:
            yield self._batch(step, None)
            return
        rows = int(self._kernels.count(self._slot_ids_NK, self._slots).sum())
        self.passes = max(1, ceil(rows / self._bound))
        for number in range(self.passes):
            yield self._batch(number, (number * self._bound, (number + 1) * self._bound))

    def add(self, rows_SD: Tensor, batch: Batch) -> None:
        """Add the experts' results for `batch`, weighted, to their tokens."""
        self._kernels.unpermute(rows_SD, batch.source_S, self._weights_NK, self.out_ND)

    def _batch(self, step: int, window: tuple[int, int] | None) -> Batch:
        permuted = self._kernels.permute(self._hidden_ND, self._slot_ids_NK, self._slots, window)
        return Batch(permuted.rows_SD, permuted.counts_L, permuted.source_S, step)
