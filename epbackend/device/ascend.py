"""Ascend NPUs. This version finds torch-npu; the CANN kernels that use it come with a later one."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from epbackend.device.base import Device, Memory
from epbackend.errors import UnavailableError
from epbackend.kernels import Kernels


class AscendDevice(Device):
    name = "ascend"
    collective_backend = "hccl"

    def unavailable(self) -> str | None:
        if find_spec("torch_npu") is None:
            return "torch-npu is not installed; install CANN and epbackend[ascend], or use device cpu"
        return "its kernels come with a later version of epbackend; use device cpu"

    @property
    def kernels(self) -> Kernels:
        raise UnavailableError(f"device ascend cannot be used: {self.unavailable()}")

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def memory(self, local_rank: int = 0) -> Memory:
        free, total = torch.get_device_module("npu").mem_get_info(local_rank)
        return Memory(total, free)
