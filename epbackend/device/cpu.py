from __future__ import annotations

from epbackend.device.base import Device
from epbackend.kernels.cpu import CpuKernels


class CpuDevice(Device):
    name = "cpu"
    collective_backend = "gloo"

    @property
    def kernels(self):
        return CpuKernels()
