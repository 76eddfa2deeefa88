"""The contract of a device: whether it can be used and why not, its memory, its collectives, its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist

from epbackend.errors import ConfigError, UnavailableError
from epbackend.kernels import Kernels
from epbackend.kernels.reference import ReferenceKernels


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory; `free` is about what a new allocation can get."""

    total: int
    free: int


class Device(ABC):
    """One kind of device. Another vendor's is a package with an entry point in the group `epbackend.devices`."""

    name: str
    kernel_sets: tuple[str, ...] = ("reference",)
    """The implementations of its math that can be chosen by name; "auto" is `kernels`."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this device cannot be used here, and what to do about it; None if it can."""

    def check_available(self) -> None:
        """Raises UnavailableError where this device cannot be used here."""
        if reason := self.unavailable():
            raise UnavailableError(f"device {self.name} cannot be used: {reason}")

    @property
    @abstractmethod
    def collective_backend(self) -> str:
        """The torch.distributed backend that moves this device's tensors."""

    @property
    def chip(self) -> str | None:
        """The generation of its chips, where operators are limited by it ("A2", "A3" of Ascend); None elsewhere."""
        return None

    @property
    def release(self) -> str | None:
        """The release of what its operators come with, where that limits them (CANN's, as "8.5.0"); None elsewhere."""
        return None

    @property
    def emulated(self) -> bool:
        """Whether another device stands in for it, for tests; "auto" does not take it then."""
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
        """Its math.

        Raises:
            UnavailableError: the device cannot be used here.
        """

    def kernel_set(self, name: str = "auto") -> Kernels:
        """One implementation of its math; `reference` is plain torch, right everywhere and slow.

        Raises:
            ConfigError: this device has no kernels of that name.
            UnavailableError: the device cannot be used here.
        """
        if name == "auto":
            return self.kernels
        if name not in self.kernel_sets:
            known = ", ".join(("auto", *self.kernel_sets))
            raise ConfigError(f"kernels {name!r} are unknown for device {self.name}; known are {known}")
        self.check_available()
        return self._kernels_named(name)

    def _kernels_named(self, name: str) -> Kernels:
        """One of `kernel_sets`, on a device that can be used."""
        return ReferenceKernels()

    @abstractmethod
    def torch_device(self, local_rank: int) -> torch.device:
        """The device of one of a machine's ranks."""

    @abstractmethod
    def memory(self, local_rank: int = 0) -> Memory:
        """The memory that this rank can use now."""
