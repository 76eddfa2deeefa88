"""Kernels that are compiled for a chip without a GPU, and what every one of them is held to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from epbackend.kernels.triton.compile_info import compiling_for
from epbackend.kernels.triton.tiles import Chip


@contextmanager
def compiling(chip: Chip) -> Iterator[list[Any]]:
    """`compiling_for`; at its end no kernel has an instruction that the assembler is known to get wrong."""
    with compiling_for(chip) as compiled:
        yield compiled
    assert {kernel.metadata.name: found for kernel in compiled if (found := shuffled_constants(kernel))} == {}


def shuffled_constants(kernel: Any) -> list[str]:
    """The instructions of a compiled kernel by which lanes pass on one and the same number. There are to be none.

    `tl.gather` makes them of a block that holds one number. The ptxas 12.8.93 that Triton 3.6 and 3.7 bring along puts
    the number C in their place, and then max(x - C, y) in the place of max(C - x, y), and min likewise, on chips that
    have VIADDMNMX (Hopper and later). Thus the split `level_by_node` was wrong on an H200 (2026-11-27).
    """
    ptx = kernel.asm["ptx"]
    written = Counter(re.findall(r"^\s*(?:@!?%p\d+ )?[a-z][\w.]*\s+\{?\s*(%r\d+)", ptx, re.M))
    numbers = {name for name in re.findall(r"\bmov\.[bu]32\s+(%r\d+), -?\w+;", ptx) if written[name] == 1}
    shuffles = re.findall(r"\b(shfl\.sync\.\S+\s+\S+, (\S+),.*;)", ptx)
    return [shuffle for shuffle, passed in shuffles if passed in numbers or not passed.startswith("%")]
