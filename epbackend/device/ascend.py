"""Ascend NPUs, through torch-npu: HCCL between ranks, the fused operators of CANN on each."""

from __future__ import annotations

from functools import cache, cached_property
from importlib import import_module, metadata
from importlib.util import find_spec

import torch

from epbackend.device.base import Device, Memory
from epbackend.kernels import Kernels
from epbackend.kernels.npu import ops
from epbackend.kernels.npu.kernels import NpuKernels


class AscendDevice(Device):
    name = "ascend"
    collective_backend = "hccl"

    def unavailable(self) -> str | None:
        return _unavailable()

    @property
    def kernels(self) -> Kernels:
        self.check_available()
        return NpuKernels()

    @cached_property
    def chip(self) -> str:
        """The generation: "A2", "A3", or CANN's own name of another one."""
        name = ops.chip_name()
        generations = {"Ascend910B": "A2", "Ascend910_93": "A3"}
        return next((chip for prefix, chip in generations.items() if name.startswith(prefix)), name)

    @cached_property
    def release(self) -> str | None:
        return ops.cann_release()

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def memory(self, local_rank: int = 0) -> Memory:
        free, total = torch.get_device_module("npu").mem_get_info(local_rank)
        return Memory(total, free)


@cache
def _unavailable() -> str | None:
    if find_spec("torch_npu") is None:
        return "torch-npu is not installed; install CANN and epbackend[ascend], or use device cpu"
    if reason := _wrong_version():
        return reason
    try:
        import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return (
            f"torch-npu cannot be loaded ({error}); source CANN's set_env.sh and take the torch-npu that fits "
            f"torch {torch.__version__}, or use device cpu"
        )
    if not torch.get_device_module("npu").is_available():
        return "torch-npu sees no NPU; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES, or use device cpu"
    return None


def _wrong_version() -> str | None:
    """Why this torch-npu cannot go with this torch; to load it all the same may end the process."""
    try:
        installed = metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return None  # built in place: what does not fit is found when it is loaded
    theirs, own = (".".join(version.split(".")[:2]) for version in (installed, torch.__version__))
    if theirs == own:
        return None
    return (
        f"torch-npu {installed} is for torch {theirs}, and torch is {torch.__version__}; install the one for it "
        f"(pip install 'torch-npu=={own}.*', and the CANN that its release notes name), or use device cpu"
    )
