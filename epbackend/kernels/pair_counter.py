"""Counts which experts tokens choose together, on their device, for a sample of the tokens.

Letters: T tokens, K their experts, E experts, S pairs, flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EVERY = 8
"""Calls from one that is looked at to the next: on a CPU that costs 4 to 13 us a call on average (2026-11-27)."""
MOST_TOKENS = 256
"""Of a call, at equal distances: a long prompt is not looked at token by token."""


class PairCounter:
    """Adds up the pairs of one layer."""

    def __init__(self, experts: int, device: torch.device) -> None:
        # Models are loaded in inference mode, whose tensors cannot be changed outside of it.
        with torch.inference_mode(False):
            self._tokens_S = torch.zeros(experts * experts, dtype=torch.int64, device=device)
        self._experts, self._calls = experts, 0

    def add(self, topk_ids_TK: Tensor, padding_T1: Tensor | None = None) -> None:
        """Looks at every EVERY-th call and waits for nothing. A CUDA graph holds none of it: replays count nothing.

        Rows for which `padding_T1` (bool) is true are no tokens.
        """
        if topk_ids_TK.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._calls += 1
        if self._calls % EVERY != 1:
            return
        looked_at = slice(None, None, -(-len(topk_ids_TK) // MOST_TOKENS) or 1)
        ids_TK = topk_ids_TK[looked_at].long()
        # On other devices than the CPU an id of no expert is found only later.
        ids_TK = ids_TK.clamp(0, self._experts - 1)
        both_TKK = ids_TK[:, :, None] * self._experts + ids_TK[:, None, :]
        counted_TKK = torch.ones_like(both_TKK)
        if padding_T1 is not None:
            counted_TKK.masked_fill_(padding_T1[looked_at, :, None], 0)
        self._tokens_S.scatter_add_(0, both_TKK.reshape(-1), counted_TKK.reshape(-1))

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What is counted inside is forgotten."""
        tokens_S, calls = self._tokens_S.clone(), self._calls
        yield
        self._tokens_S.copy_(tokens_S)
        self._calls = calls

    @property
    def tokens_EE(self) -> Tensor:
        """Counted tokens that chose both experts (int64, on the CPU); on the diagonal, the expert. Waits for them."""
        return self._tokens_S.cpu().view(self._experts, self._experts)
