"""A CANN of the project's own making: lets the unmodified torch-npu wheel run where there is no NPU.

Device memory is host memory, streams are done at once, HCCL is shared memory between processes, and each aclnn operator
that we call is its documented formula in plain torch, with the documented limits checked and everything undefined
filled with garbage. What is not emulated fails and says its name.

It proves that we call torch_npu rightly and that our algorithm is right as we read the documentation. It proves
nothing about the real kernels: numerics, tiling, speed, graph capture, asynchrony, HCCL's transport.

    cann.start("A3", devices=4)     # before anything else imports torch_npu
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from pathlib import Path

from tests.helpers.cann import build

WHEEL = Path(__file__).parents[3] / ".torch-npu"
"""Where `make test-ascend` unpacks the wheel: aside, because torch imports a torch_npu that it finds beside itself."""

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""Variable by which torch leaves torch_npu alone while it is imported itself."""
CHIPS = {"A2": "Ascend910B1", "A3": "Ascend910_9391", "310P": "Ascend310P3"}
"""CANN's names; the last one is there to be refused."""
OPERATORS = (
    "elementwise",
    "formats",
    "matmul",
    "swiglu_quant",
    "routing",
    "fused_dispatch",
    "gating",
    "attention",
)


def missing() -> str | None:
    """Why the emulation cannot run here; None if it can."""
    if not (WHEEL / "torch_npu").exists():
        return f"the torch-npu wheel is not in {WHEEL.name}/; make test-ascend puts it there"
    return build.missing()


def start(chip: str = "A3", devices: int = 1) -> None:
    """Make `torch.npu` work in this process, on `devices` emulated NPUs. There is no way back."""
    os.environ[AUTOLOAD] = "0"
    sys.path.append(str(WHEEL))
    load_libraries(chip, devices)
    importlib.import_module("torch_npu")


def load_libraries(chip: str, devices: int) -> None:
    """Load what the wheel is linked with, before it is imported, and compute for it in every thread."""
    # Imported late: they need torch, which looks for torch_npu while it is imported, and so comes here.
    from tests.helpers.cann import aten, registry

    for module in OPERATORS:
        importlib.import_module(f"tests.helpers.cann.{module}")
    # torch_npu would queue operators to a thread of its own, which Python's emulations cannot serve.
    os.environ.update(TASK_QUEUE_ENABLE="0", EMULATED_NPU_CHIP=CHIPS[chip], EMULATED_NPU_COUNT=str(devices))
    folder = build.build(WHEEL, registry.OPERATORS)
    # The loader takes a library that is already there by its name, so nothing needs LD_LIBRARY_PATH.
    libraries = {name: ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in build.LIBRARIES}
    registry.install(libraries["libopapi.so"], libraries["libascendcl.so"])
    aten.watch(libraries["libascendcl.so"])
    aten.compute_on_cpu()
