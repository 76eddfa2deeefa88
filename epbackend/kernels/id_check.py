"""Catch ids of experts that do not exist, and tell of them without ever waiting for the device.

Such an id is served as if it were one that exists, so it never leads to a wild write; but a router that makes it is
broken. The finding lies in host memory, which the device writes: a CPU's call raises it at once, another device's a
later one. Replays of a CUDA graph write it too, and the next call that is no replay raises it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.errors import ConfigError

NOTHING = -(1 << 62)


class ExpertIdCheck:
    """Watches one layer's ids, which must lie in [0, experts)."""

    def __init__(self, experts: int, device: torch.device, layer: int = 0) -> None:
        self._experts, self._layer = experts, layer
        on_host = device.type in ("cpu", "meta")
        self.found_1 = torch.full((1,), NOTHING, dtype=torch.int64, pin_memory=not on_host)
        """The largest wild id of some call, or NOTHING. Pinned, so that a kernel can write it."""
        self._largest_1 = torch.full((1,), NOTHING, dtype=torch.int64, device=device)

    def report(self) -> None:
        """Raise ConfigError if a wild id is known of by now."""
        found = int(self.found_1)
        if found != NOTHING:
            raise ConfigError(
                f"layer {self._layer}: a token chose expert {found}, and the experts are 0 to {self._experts - 1}; "
                "the router and the placement are not of the same model, or the router computed garbage"
            )

    def admit(self, ids_TK: Tensor) -> Tensor:
        """The ids (int64), wild ones replaced by their nearest neighbour; by torch's operators."""
        admitted_TK = admit(ids_TK, self._experts)
        if ids_TK.numel():
            wild_TK = ids_TK.long().masked_fill(admitted_TK == ids_TK, NOTHING)
            torch.maximum(self._largest_1, wild_TK.amax(), out=self._largest_1)
            self.found_1.copy_(self._largest_1, non_blocking=True)
        self.report()
        return admitted_TK


def admit(ids_TK: Tensor, experts: int) -> Tensor:
    """The same without telling of it."""
    return ids_TK.long().clamp(0, experts - 1)
