"""Catch ids of experts that do not exist, and report them without waiting for the device.

Such an id is served as if it were one that exists, so it never leads to a write out of bounds; but a router that makes
it is broken. The device writes what it finds into host memory: a CPU's call raises it at once, another device's a later
one. Replays of a CUDA graph write it too, and the next call that is no replay raises it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.errors import ConfigError

NOTHING = -(1 << 62)


class ExpertIdCheck:
    """Checks one layer's expert ids, which must lie in [0, experts)."""

    def __init__(self, experts: int, device: torch.device, layer: int = 0) -> None:
        self._experts, self._layer = experts, layer
        on_host = device.type in ("cpu", "meta")
        self.found_1 = torch.full((1,), NOTHING, dtype=torch.int64, device="cpu", pin_memory=not on_host)
        """The largest id out of range of some call, or NOTHING. Pinned, so that a kernel can write it."""
        self._largest_1 = torch.full((1,), NOTHING, dtype=torch.int64, device=device)

    def report(self) -> None:
        """Raise what the device has found by now.

        Raises:
            ConfigError: An id was out of range in this call or an earlier one.
        """
        found = int(self.found_1)
        if found != NOTHING:
            raise ConfigError(
                f"layer {self._layer}: a token chose expert {found}, and the experts are 0 to {self._experts - 1}; "
                "the router and the placement are not of the same model, or the router computed garbage"
            )

    def clamp(self, ids_TK: Tensor) -> Tensor:
        """`clamp_ids`, and `report` what was out of range; by torch's operators."""
        if ids_TK.is_cpu and _all_exist(ids_TK, self._experts):
            return ids_TK.long()
        clamped_TK = clamp_ids(ids_TK, self._experts)
        if ids_TK.is_cpu:
            self._largest_1.fill_(NOTHING)  # what earlier calls had was raised at once
        if ids_TK.numel():
            outside_TK = ids_TK.long().masked_fill(clamped_TK == ids_TK, NOTHING)
            torch.maximum(self._largest_1, outside_TK.amax(), out=self._largest_1)
            self.found_1.copy_(self._largest_1, non_blocking=True)
        self.report()
        return clamped_TK


def _all_exist(ids_TK: Tensor, experts: int) -> bool:
    """By NumPy, which takes a third of torch's time for one token's ids."""
    values_TK = ids_TK.numpy()
    return bool(values_TK.min(initial=0) >= 0 and values_TK.max(initial=0) < experts)


def clamp_ids(ids_TK: Tensor, experts: int) -> Tensor:
    """The ids (int64), those out of [0, experts) replaced by the nearest that exists."""
    return ids_TK.long().clamp(0, experts - 1)
