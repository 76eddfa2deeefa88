"""Sampling that keeps its word about seeds: the same seed and position draw the same token, in any batch."""

from __future__ import annotations

import numpy as np
import torch
from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingImpl
from torch import Tensor


class SeededMultinomial(MultinomialSamplingImpl):
    """Draws by the inverse of the cumulative distribution; LMDeploy's default ignores the seeds."""

    def forward(
        self, scores: Tensor, seeds: Tensor, offsets: Tensor, indices: Tensor | None = None
    ) -> Tensor:
        """One token of each row: scores [B, V] (probabilities up to a factor), seeds and offsets [B] -> ids [B]."""
        cumulative_BV = scores.double().cumsum(dim=-1)
        threshold_B1 = uniform(seeds, offsets)[:, None] * cumulative_BV[:, -1:]
        column_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp_(
            max=scores.shape[1] - 1
        )
        chosen = column_B1 if indices is None else indices.gather(1, column_B1)
        return chosen.view(-1)


def uniform(seeds: Tensor, offsets: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, offset), float64: SplitMix64 (Steele, Lea, Flood 2014) as a hash of both."""
    with np.errstate(over="ignore"):
        state = _mix(seeds.numpy().astype(np.uint64)) + offsets.numpy().astype(np.uint64)
        bits = _mix(state)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
