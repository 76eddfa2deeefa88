"""Torch's symmetric memory over shared memory of the host, for ranks that are processes on one CPU.

A stand-in for the two functions that the dispatcher calls, with their documented behaviour. Everything else is real:
the ranks are processes that map each other's memory at addresses of their own, and wait for each other in the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from epbackend.dispatch import symmetric

_paths: dict[int, str] = {}
"""Under which path other processes find the memory at an address."""


@dataclass
class Handle:
    buffer_ptrs: list[int]
    _mapped: list[Tensor] = field(default_factory=list)


def empty_strided_p2p(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    path = f"/proc/{os.getpid()}/fd/{os.memfd_create('symmetric')}"
    memory = torch.from_file(path, shared=True, size=size[0], dtype=dtype)
    _paths[memory.data_ptr()] = path
    return memory


def rendezvous(tensor: Tensor, group: dist.ProcessGroup) -> Handle:
    paths: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(paths, _paths[tensor.data_ptr()], group)
    mapped = [torch.from_file(path, shared=True, size=len(tensor), dtype=tensor.dtype) for path in paths]
    dist.barrier(group)
    return Handle([each.data_ptr() for each in mapped], mapped)


@contextmanager
def over_shared_memory() -> Iterator[None]:
    """Inside, the dispatcher `symmetric` serves ranks of one CPU."""
    with (
        mock.patch.object(symmetric, "not_built", return_value=None),
        mock.patch.object(symmetric, "no_p2p_access", return_value=None),
        mock.patch.object(symmetric_memory, "rendezvous", rendezvous),
        mock.patch.object(symmetric_memory._SymmetricMemory, "empty_strided_p2p", empty_strided_p2p),
    ):
        yield
