"""A tensor that every rank has, in memory that all of them can reach."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 128
"""Bytes: where each such tensor begins, so that rows move in the widest loads and stores."""


@dataclass(frozen=True)
class Mirror:
    """This rank's own tensor, and where each rank's lies in this rank's address space."""

    mine: Tensor
    addresses_R: Tensor
    """int64, on the device."""


@triton.jit
def reach(addresses_R, rank, mine):
    """Pointer to the first element of each rank's tensor, of the type that `mine` points to; `rank` may be a block."""
    address = tl.load(addresses_R + rank)
    return tl.multiple_of(address.to(tl.pointer_type(mine.dtype.element_ty)), 16)
