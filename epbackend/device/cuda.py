"""CUDA GPUs: Triton kernels, NCCL between ranks.

With TRITON_INTERPRET=1 in the environment Triton interprets the kernels on the CPU, slowly, and the device takes CPU
tensors. Its code is tested that way where there is no GPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from epbackend.device.base import Device, Memory
from epbackend.device.cpu import CpuDevice
from epbackend.kernels import Kernels
from epbackend.names import CUDA_KERNELS, FAST_FP8

OLDEST = (8, 0)
"""Compute capability of the oldest chips whose matrix units take bfloat16 (Ampere)."""
NEWEST = 12
"""The last major one in `kernels.triton.tiles.FAMILIES`."""


class CudaDevice(Device):
    name = "cuda"
    collective_backend = "nccl"
    kernel_sets = (*CUDA_KERNELS, "reference")

    def unavailable(self) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed; install epbackend[cuda], or use device cpu"
        if _interpreting():
            return None
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch, or use device cpu"
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device cpu"
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if capability < OLDEST:
            return f"{name} is older than Ampere, which the kernels need; use device cpu"
        if capability[0] > NEWEST:
            major, minor = capability
            return (
                f"{name} has compute capability {major}.{minor}, and this release has tiles for those up to {NEWEST}: "
                "update epbackend, or use device cpu"
            )
        return None

    @property
    def emulated(self) -> bool:
        return _interpreting()

    @property
    def kernels(self) -> Kernels:
        return self.kernel_set("triton")

    def _kernels_named(self, name: str) -> Kernels:
        if name in ("triton", FAST_FP8):
            from epbackend.kernels.triton.kernels import TritonKernels  # imports Triton, which takes a second

            return TritonKernels(fast_fp8=name == FAST_FP8)
        if name == "grouped_mm":
            from epbackend.kernels.torch_grouped_mm import GroupedMmKernels

            return GroupedMmKernels()
        return super()._kernels_named(name)

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu") if _interpreting() else torch.device("cuda", local_rank)

    def memory(self, local_rank: int = 0) -> Memory:
        if _interpreting():
            return CpuDevice().memory(local_rank)
        free, total = torch.cuda.mem_get_info(local_rank)
        return Memory(total, free)


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter; read the way Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
