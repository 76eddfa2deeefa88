"""What a launch must know of the chip: how many programs it runs at once, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from triton.runtime.driver import driver


@dataclass(frozen=True)
class Chip:
    """A GPU, as the tile tables and the static model see it."""

    name: str
    capability: tuple[int, int]
    sms: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Shared memory that one program may have."""

    @property
    def tma(self) -> bool:
        """Whether it has the bulk tensor copy engine (Hopper and later)."""
        return self.capability >= (9, 0)

    @property
    def fp8(self) -> bool:
        """Whether it multiplies float8_e4m3fn."""
        return self.capability >= (8, 9)


A100 = Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912)
L40S = Chip("NVIDIA L40S", (8, 9), 142, 101_376)
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448)
H200 = Chip("NVIDIA H200", (9, 0), 132, 232_448)
B200 = Chip("NVIDIA B200", (10, 0), 148, 232_448)
INTERPRETER = Chip("Triton's interpreter", (9, 0), 3, 232_448)
"""Three programs, so that each of them has several tiles to take, and one ends before the others."""


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a torch device; the CPU stands for Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    limits = driver.active.utils.get_device_properties(device.index)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count, limits["max_shared_mem"])
