"""LMDeploy's ranks as processes of one machine whose GPUs are too few for them, joined by `peer_group`."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from epbackend.device.cpu import CpuDevice
from epbackend.dispatch.symmetric import OVERLAP
from epbackend.engines.lmdeploy.workers import mp
from tests.helpers import peer_group

if TYPE_CHECKING:  # ranks import this file, and do without it
    import pytest


def on_shared_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are started from now on by the mp executor share what devices there are."""
    monkeypatch.setattr(mp, "GuardedProc", SharingProc)


class SharingProc(mp.GuardedProc):
    """A rank. LMDeploy would give each a GPU, and join them by NCCL, or on a CPU by `cpu_group`."""

    def _main_loop(self, *args: Any, **kwargs: Any) -> None:
        peer_group.register()
        replaced = "nccl" if torch.cuda.is_available() else CpuDevice().collective_backend
        for name in ("init_process_group", "new_group"):
            setattr(dist, name, _with_peers(getattr(dist, name), replaced))
        share_devices()
        super()._main_loop(*args, **kwargs)


def share_devices() -> None:
    """From now on in this process, a number past the last GPU's names the first ones again."""
    os.environ[OVERLAP] = "1"
    if torch.cuda.is_available():
        set_device = torch.cuda.set_device
        torch.cuda.set_device = lambda device: set_device(_shared(device))


def _with_peers(start: Any, replaced: str) -> Any:
    @functools.wraps(start)
    def start_with_peers(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return start(*args, backend=peer_group.NAME if backend == replaced else backend, **kwargs)

    return start_with_peers


def _shared(device: Any) -> Any:
    return device % torch.cuda.device_count() if isinstance(device, int) else device
