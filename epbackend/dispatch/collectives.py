"""Every torch.distributed call of the data path: the same code for gloo, NCCL and HCCL.

Each collective carries its own timeout, which the backend itself keeps (a timeout on the wait alone would leave the
backend's thread stuck in the collective, and the process could not exit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from epbackend.dispatch.base import Problem
from epbackend.errors import CollectiveError


@dataclass(frozen=True)
class Pending:
    """Rows under way. Holds the sent rows too: the backend reads them until the collective ends."""

    rows: Tensor
    sent: Tensor
    _wait: Callable[[], None]

    def wait(self) -> Tensor:
        """The received rows; raises CollectiveError when they do not come."""
        self._wait()
        return self.rows


@dataclass(frozen=True)
class Collectives:
    """The collectives of one process group on behalf of one layer."""

    group: dist.ProcessGroup
    timeout_s: float
    layer: int

    @classmethod
    def of(cls, problem: Problem) -> Collectives:
        """Among the ranks that share the experts."""
        return cls(problem.ranks.group, problem.settings.timeout_s, problem.layer)

    @classmethod
    def among_same_tokens(cls, problem: Problem) -> Collectives:
        """Among the ranks that hold the same tokens."""
        return cls(problem.ranks.token_group, problem.settings.timeout_s, problem.layer)

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, one after the other along the first dimension; equal shapes."""
        whole = part.new_empty(self.group.size() * part.shape[0], *part.shape[1:])
        self._run("all_gather", c10d.AllgatherOptions(),
                  lambda opts: self.group._allgather_base(whole, part.contiguous(), opts))()
        return whole

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place."""
        self._run("all_reduce", c10d.AllreduceOptions(), lambda opts: self.group.allreduce([tensor], opts))()

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """This rank's part, along the first dimension, of the sum over all ranks."""
        part = whole.new_empty(whole.shape[0] // self.group.size(), *whole.shape[1:])
        self._run("reduce_scatter", c10d.ReduceScatterOptions(),
                  lambda opts: self.group._reduce_scatter_base(part, whole, opts))()
        return part

    def all_to_all(self, rows: Tensor, send_R: list[int], receive_R: list[int]) -> Pending:
        """Start sending `send_R[r]` rows to each rank r; comes back at once."""
        received = rows.new_empty(sum(receive_R), *rows.shape[1:])
        wait = self._run("all_to_all", c10d.AllToAllOptions(),
                         lambda opts: self.group.alltoall_base(received, rows, receive_R, send_R, opts))
        return Pending(received, rows, wait)

    def _run(self, name: str, opts, start) -> Callable[[], None]:
        opts.timeout = timedelta(seconds=self.timeout_s)
        opts.asyncOp = True
        work = start(opts)

        def wait() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise CollectiveError(f"{name} of layer {self.layer} failed: {error}") from error

        return wait
