"""What the MoE layers of all ranks did, alike for every engine.

Letters: R ranks, Y layers with experts, E experts, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

STEPS = 1024
"""Steps whose sums are kept one by one."""


@dataclass(frozen=True)
class LoadReport:
    """The work of all ranks since the engine started, its warm-up left out."""

    layers: tuple[int, ...]
    """The model's layers that have experts: the second axis of tokens_RYE."""
    tokens_2RYE: np.ndarray
    """Tokens that rank R computed for expert E of layer Y in each of PHASES, int64."""
    calls: int
    """Steps of the engine: forward passes through all layers."""
    passes: int
    """The most passes that a single call took (1: the cutoff never bound)."""
    rounds: int
    """The most rounds that a single call took (1: the buffers always sufficed)."""
    dispatchers: dict[str, dict[str, Any]]
    """phase -> name of its dispatcher, the reason, and why others were passed over."""
    step_imbalance_Y: np.ndarray
    """As `imbalance_Y`, but each step by itself, since in each the ranks wait for the busiest: the sum of the steps'
    maxima over the sum of their means, in the last thousand steps."""
    top_k: int
    """Experts that compute a token in each layer; 0: no layer is there yet."""

    @cached_property
    def tokens_RYE(self) -> np.ndarray:
        """The same in both phases together."""
        return self.tokens_2RYE.sum(axis=0)

    @property
    def tokens_per_rank(self) -> list[int]:
        """Expert tokens of each rank over all layers."""
        return self.tokens_RYE.sum(axis=(1, 2)).tolist()

    @property
    def imbalance_Y(self) -> np.ndarray:
        """The busiest rank's tokens over the ranks' mean, for each of `layers` (1.0: level, or no token at all)."""
        tokens_RY = self.tokens_RYE.sum(axis=2)
        mean_Y = tokens_RY.mean(axis=0)
        return np.where(mean_Y > 0, tokens_RY.max(axis=0) / np.maximum(mean_Y, 1e-9), 1.0)

    def loads_YE(self, layers: int, ep_size: int) -> np.ndarray:
        """Tokens of each logical expert in all `layers` of the model, int64; zeros where a layer has no experts.

        With `ep_size` 1 every rank computes (its share of) every token, so that one rank has seen them all.
        """
        loads_YE = np.zeros((layers, self.tokens_2RYE.shape[3]), dtype=np.int64)
        loads_YE[list(self.layers)] = self.tokens_RYE[:ep_size].sum(axis=0)
        return loads_YE

    def since(self, earlier: LoadReport) -> LoadReport:
        """The work after `earlier` was read; maxima and step_imbalance_Y stay those of the whole time."""
        tokens_2RYE = self.tokens_2RYE - earlier.tokens_2RYE if earlier.layers else self.tokens_2RYE
        return replace(self, tokens_2RYE=tokens_2RYE, calls=self.calls - earlier.calls)


def step_imbalance_Y(tokens_RSY: np.ndarray) -> np.ndarray:
    """From the tokens that each rank computed in each step: the sum of the steps' maxima over that of their means."""
    mean_Y = tokens_RSY.mean(axis=0).sum(axis=0)
    return np.where(mean_Y > 0, tokens_RSY.max(axis=0).sum(axis=0) / np.maximum(mean_Y, 1e-9), 1.0)
