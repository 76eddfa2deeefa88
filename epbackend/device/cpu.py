"""The CPU: always there; ranks of one machine are joined by `cpu_group`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from epbackend.device.base import Device, Memory
from epbackend.kernels import Kernels
from epbackend.kernels.cpu.kernels import CpuKernels


class CpuDevice(Device):
    name = "cpu"

    def unavailable(self) -> str | None:
        return None

    @property
    def collective_backend(self) -> str:
        if not dist.is_available():
            return "gloo"
        from epbackend.device import cpu_group  # late: it needs what such a torch lacks

        cpu_group.register()
        return cpu_group.NAME

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
        for group in CONTROL_GROUPS:
            if left := group.left():
                total, free = min(total, left.total), min(free, left.free)
        return Memory(total, free)


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


@dataclass(frozen=True)
class ControlGroup:
    """A container's limit of memory, where Linux shows it inside."""

    folder: Path
    limit: str
    used: str
    caches: tuple[str, ...]
    """Lines of memory.stat: pages of files, which count as used but are given up where others need them."""

    def left(self) -> Memory | None:
        """The limit, and what is free of it; None where there is no limit."""
        limit, used = _number(self.folder / self.limit), _number(self.folder / self.used)
        if limit is None or used is None:
            return None
        counters = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        caches = sum(int(counters.get(name, 0)) for name in self.caches)
        return Memory(limit, max(0, limit - used + caches))


CONTROL_GROUPS = (
    ControlGroup(Path("/sys/fs/cgroup"), "memory.max", "memory.current", ("inactive_file", "active_file")),
    ControlGroup(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
"""Of version 2 (Linux: Documentation/admin-guide/cgroup-v2.rst) and of version 1 (cgroup-v1/memory.rst), whose limit is
a number beyond all memory where there is none."""
