"""Compile kernels for a chip without a GPU, and read off what each takes: registers, spills, shared memory.

    with compiling_for(H100) as compiled:
        TritonKernels(H100).count(torch.empty(8, 4, dtype=torch.int64, device="meta"), 16)
    resources(compiled[0])      # Resources(name=..., registers=32, spilled=0, shared_bytes=512, ...)

Launches on "meta" tensors compile what they would have launched, with the same arguments and specialization.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from epbackend.kernels.triton.tiles import Chip


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a chip."""

    name: str
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of local memory for each thread: registers that did not fit, and arrays."""
    shared_bytes: int
    warps: int
    instructions: frozenset[str]
    """The matrix and copy instructions in it: which path the compiler took."""

    def programs_per_sm(self, chip: Chip) -> int:
        """How many programs one multiprocessor holds at a time (65536 registers, in steps of 8 a thread)."""
        registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        shared = chip.shared_bytes // (self.shared_bytes + 1024)
        return min(registers, shared, 64 // self.warps)


@contextmanager
def compiling_for(chip: Chip) -> Iterator[list[Any]]:
    """Inside, launches compile for `chip` and run nothing; the list collects the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    active = driver._active
    driver.set_active(_NoGpu(chip))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield compiled
    finally:
        driver.set_active(active)


class _NoGpu:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, chip: Chip) -> None:
        self._arch = 10 * chip.capability[0] + chip.capability[1]

    def get_current_device(self) -> str:
        return f"sm_{self._arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


def resources(kernel: Any) -> Resources:
    """Read a compiled kernel's cubin with the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(
        r"^\s*(?:@%p\d+ )?(wgmma|mma|tcgen05|cp\.async(?:\.bulk)?)\b", kernel.asm["ptx"], re.M
    )
    return Resources(
        kernel.metadata.name,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        frozenset(instructions),
    )
