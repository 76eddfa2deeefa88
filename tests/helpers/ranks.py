"""Run a function on several processes, which are started once and serve one test after the other.

    def rank_of(groups):              # a function of a module, so that the workers can import it
        return groups[1].rank

    assert ranks.run(2, rank_of) == [0, 1]

`groups` maps each possible number of ranks that hold the same tokens to this rank's RankGroup.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from epbackend.device import cpu_group
from epbackend.device.cpu import CpuDevice
from epbackend.dispatch.base import RankGroup
from tests.helpers.patience import PATIENCE_S

SIZES = (1, 2, 4)
MOST_GROUPS = 10_000
"""So many process groups a test makes at most."""


def forking() -> multiprocessing.context.ForkServerContext:
    """Starts processes as forks of one that has loaded torch and the layer: in no time instead of 3 s each.

    Where tests of engines run as well it has loaded LMDeploy with the plug, for the ranks of `forked_engines`.
    """
    multiprocessing.set_forkserver_preload(preloaded())
    return multiprocessing.get_context("forkserver")


def preloaded() -> list[str]:
    """Modules that are loaded before the forks: none that asks CUDA for a GPU, which no fork could use from then on.

    LMDeploy's import asks (its xgrammar loads tvm_ffi). PYTORCH_NVML_BASED_CUDA_CHECK would answer by way of NVML only
    where that can be loaded, so ranks that are to use a GPU import LMDeploy themselves.
    """
    modules = ["epbackend.moe", "tests.helpers.layer_case"]
    if os.environ.get("TRITON_INTERPRET") or torch.version.cuda is None:
        if {"tests.engines.conftest", "tests.helpers.forked_engines"} & sys.modules.keys():
            modules += ["epbackend.engines.lmdeploy.workers.mp", "epbackend.engines.lmdeploy.patches"]
        if os.environ.get("TRITON_INTERPRET") and "tests.helpers.moe_modules" in sys.modules:
            modules.append("tests.helpers.moe_modules")  # the ranks of tests/engines/test_cuda_plug.py
    modules += {"tests.helpers.quick_interpreter", "tests.helpers.emulated_npus"} & sys.modules.keys()
    return modules


def free_port() -> int:
    """A TCP port at which ranks that a test starts by itself can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankPool:
    """Four workers; a test uses the first 1, 2 or 4 of them."""

    def __init__(self, backend: str | None = None, prepare: Callable[..., None] | None = None) -> None:
        """`backend` joins the workers, the CPU's if None; `prepare(rank=...)` runs first in each, if given."""
        self._backend, self._prepare = backend, prepare
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="epbackend-ranks-")
        self._starts = self._tasks = 0

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(groups, *args)` returns on each of `size` ranks; fails with the ranks' tracebacks."""
        if not self._workers:
            self._start()
        self._tasks += 1
        task = pickle.dumps((self._tasks, size, function, args))
        connections = [connection for _, connection in self._workers[:size]]
        try:
            for connection in connections:
                connection.send((list(sys.path), task))
        except OSError:  # a rank ended after its last answer, and said why: the next test gets others
            self.close()
            raise
        answers = {}
        while len(answers) < size:
            ready = wait([c for c in connections if c not in answers], timeout=PATIENCE_S)
            if not ready:
                break
            for connection in ready:
                answers[connection] = _answer(connection)
            if any(error for error, _ in answers.values()):
                break
        if len(answers) < size or any(error for error, _ in answers.values()):
            self.close()  # a rank that left a collective halfway leaves broken groups behind
            errors = [f"rank {connections.index(c)}:\n{error}" for c, (error, _) in answers.items() if error]
            raise AssertionError("\n".join(errors) or f"{size - len(answers)} ranks did not answer")
        return [answers[connection][1] for connection in connections]

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = forking()
        self._starts += 1
        store = Path(self._folder.name) / f"store-{self._starts}"
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            arguments = (rank, str(store), theirs, self._backend, self._prepare)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _answer(connection: Connection) -> tuple[str | None, Any]:
    try:
        return connection.recv()
    except EOFError:
        return "the process died", None


def _work(
    rank: int, store: str, connection: Connection, backend: str | None, prepare: Callable[..., None] | None
) -> None:
    torch.set_num_threads(1)
    if prepare:
        prepare(rank=rank)
    if backend is None:  # gloo joins ranks on one GPU
        backend = "gloo" if torch.cuda.is_available() else CpuDevice().collective_backend
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=max(SIZES),
        timeout=timedelta(seconds=PATIENCE_S / 2),
    )
    groups = {1: {1: RankGroup.single()}} | {size: _groups(rank, size) for size in SIZES if size > 1}
    kept = set(distributed_c10d._world.pg_map)
    while True:
        try:
            sys.path[:], task = connection.recv()
        except EOFError:  # the tests are over
            return
        try:
            number, size, function, args = pickle.loads(task)
            # Torch numbers the groups that a rank makes. Ranks that were left out of a test would meet in old ones.
            distributed_c10d._world.group_count = number * MOST_GROUPS
            connection.send((None, function(groups[size], *args)))
        except Exception:
            connection.send((traceback.format_exc(), None))
        _end_groups(kept)


def _end_groups(kept: set[dist.ProcessGroup]) -> None:
    """Those that a test has made: while one of gloo lives, gloo looks a hundred times a second for what has come."""
    for group, (backend, _) in [*distributed_c10d._world.pg_map.items()]:
        if backend in ("gloo", cpu_group.NAME) and group not in kept:
            dist.destroy_process_group(group)


def _groups(rank: int, size: int) -> dict[int, RankGroup]:
    """This rank's place among the first `size` ranks, for each number of ranks that hold the same tokens."""
    group = dist.new_group(range(size))
    places = {1: RankGroup.of(group)}
    for token_size in [n for n in SIZES if 1 < n <= size]:
        for first in range(0, size, token_size):
            token_group = dist.new_group(range(first, first + token_size))
            if first <= rank < first + token_size:
                places[token_size] = RankGroup.of(group, token_group)
    return places
