"""CUDA GPUs. This version finds them; the Triton kernels that use them come with a later one."""

from __future__ import annotations

import torch

from epbackend.device.base import Device, Memory
from epbackend.errors import UnavailableError
from epbackend.kernels import Kernels


class CudaDevice(Device):
    name = "cuda"
    collective_backend = "nccl"

    def unavailable(self) -> str | None:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch, or use device cpu"
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device cpu"
        return "its kernels come with a later version of epbackend; use device cpu"

    @property
    def kernels(self) -> Kernels:
        raise UnavailableError(f"device cuda cannot be used: {self.unavailable()}")

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    def memory(self, local_rank: int = 0) -> Memory:
        free, total = torch.cuda.mem_get_info(local_rank)
        return Memory(total, free)
