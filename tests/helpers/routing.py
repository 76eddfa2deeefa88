"""Choices of tokens, drawn."""

from __future__ import annotations

import torch


def routing(tokens: int, top_k: int, low: int, high: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
