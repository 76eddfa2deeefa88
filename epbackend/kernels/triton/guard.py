"""Catch ids out of range on the device, and tell of them without ever waiting for it.

`permute` ignores such ids, so they never lead to a wild write; but a router that makes them is broken, and should not
go unnoticed. A check costs one small launch; the finding travels to the host on its own and is raised by a later call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.errors import ConfigError

BLOCK = 1024


class IdGuard:
    """Watches ids that must lie in [-1, limit); -1 is a choice that stands for no slot."""

    def __init__(self, name: str, limit: int, device: torch.device) -> None:
        """`name` is what the ids are called in the message."""
        self._name, self._limit = name, limit
        self._found_2 = torch.tensor([0, -(1 << 62)], dtype=torch.int64, device=device)
        self._seen_2 = self._found_2.to("cpu", copy=True)
        if device.type == "cuda":
            self._seen_2 = self._seen_2.pin_memory()

    def watch(self, ids_TK: Tensor) -> None:
        """Raise ConfigError for what earlier calls found and the host has heard of; then check `ids_TK`."""
        self.report()
        if ids_TK.numel():
            grid = (triton.cdiv(ids_TK.numel(), BLOCK),)
            _find_bad[grid](ids_TK, self._found_2, ids_TK.numel(), self._limit, BLOCK)
            self._seen_2.copy_(self._found_2, non_blocking=True)

    def report(self) -> None:
        """Raise ConfigError if a bad id is known of by now."""
        bad, worst = self._seen_2.tolist()
        if bad:
            raise ConfigError(
                f"{self._name}: {bad} ids lay outside of [-1, {self._limit}), {worst} among them; their choices were "
                "left out. The router and the slot map are not of the same model"
            )


@triton.jit(do_not_specialize=["S", "limit"])
def _find_bad(ids_S, found_2, S, limit, BLOCK: tl.constexpr):
    """found_2: how many ids are bad, and the largest of them. Sums and maxima do not depend on who comes first."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_S + place, mask=place < S, other=-1).to(tl.int64)
    bad = (ids < -1) | (ids >= limit)
    count = tl.sum(bad.to(tl.int64))
    if count > 0:
        tl.atomic_add(found_2, count)
        tl.atomic_max(found_2 + 1, tl.max(tl.where(bad, ids, -(1 << 62))))
