"""Run a function on fresh processes of this machine, one thread each, and collect what they return."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epbackend.device import get_device
from epbackend.dispatch.base import RankGroup


def run_on_ranks(
    size: int, function: Callable[..., Any], *args: Any, backend: str | None = None
) -> list[Any]:
    """What `function(ranks, *args)` returns on each rank; a rank that fails ends the measurement.

    `backend` joins them, that of the CPU if None.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(size) as pool:
        store = str(Path(folder) / "store")
        jobs = [pool.apply_async(_run, (rank, size, store, backend, function, args)) for rank in range(size)]
        return [job.get() for job in jobs]


def _run(
    rank: int, size: int, store: str, backend: str | None, function: Callable[..., Any], args: tuple
) -> Any:
    torch.set_num_threads(1)
    if size == 1:
        return function(RankGroup.single(), *args)
    backend = backend or get_device("cpu").collective_backend
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        return function(RankGroup.of(dist.group.WORLD), *args)
    finally:
        dist.destroy_process_group()
