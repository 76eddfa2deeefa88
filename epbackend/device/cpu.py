"""The CPU: always there, gloo between ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from epbackend.device.base import Device, Memory
from epbackend.kernels import Kernels
from epbackend.kernels.cpu.kernels import CpuKernels


class CpuDevice(Device):
    name = "cpu"
    collective_backend = "gloo"

    def unavailable(self) -> str | None:
        return None

    @property
    def kernels(self) -> Kernels:
        return CpuKernels()

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def memory(self, local_rank: int = 0) -> Memory:
        """The machine's memory, or what a container's limit leaves of it; all ranks of the machine share it."""
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = _available() or os.sysconf("SC_AVPHYS_PAGES") * page
        limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
        if limit is None or used is None:
            return Memory(total, free)
        return Memory(min(total, limit), min(free, limit - used))


def _available() -> int | None:
    """Linux's own estimate, which counts caches that it would give up."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _number(path: Path) -> int | None:
    """The number in a control group's file; None where there is no file or no limit ("max")."""
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None
