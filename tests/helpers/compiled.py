"""Kernels that are compiled for a chip without a GPU, and what every one of them is held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from epbackend.kernels.triton.compile_info import compiling_for, shuffled_constants
from epbackend.kernels.triton.tiles import Chip


@contextmanager
def compiling(chip: Chip) -> Iterator[list[Any]]:
    """`compiling_for`; at its end no kernel has an instruction that the assembler is known to get wrong."""
    with compiling_for(chip) as compiled:
        yield compiled
    assert {kernel.metadata.name: found for kernel in compiled if (found := shuffled_constants(kernel))} == {}
