"""What a device is: whether it can be used and why not, its memory, its collectives, its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist

from epbackend.kernels import Kernels


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory; `free` is what a new allocation may hope for."""

    total: int
    free: int


class Device(ABC):
    """One kind of device. Another vendor's is a package with an entry point in the group `epbackend.devices`."""

    name: str
    collective_backend: str
    """The torch.distributed backend that moves this device's tensors."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this device cannot be used here and what would help; None if it can."""

    @property
    def emulated(self) -> bool:
        """Whether another device only stands in for it, for tests: "auto" passes it over."""
        return False

    def no_collectives(self) -> str | None:
        """Why several of its ranks cannot talk to each other with this torch; None if they can."""
        name = self.collective_backend
        if self.emulated or (dist.is_available() and dist.is_backend_available(name)):
            return None
        return (
            f"torch {torch.__version__} has no {name.upper()}; install a build that has it, or run one rank"
        )

    @property
    @abstractmethod
    def kernels(self) -> Kernels:
        """Its math; raises UnavailableError where `unavailable` gives a reason."""

    @abstractmethod
    def torch_device(self, local_rank: int) -> torch.device:
        """The device of one of a machine's ranks."""

    @abstractmethod
    def memory(self, local_rank: int = 0) -> Memory:
        """The memory that this rank can use now."""
