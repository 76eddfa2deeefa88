"""Every torch.distributed call of the data path: the same code for gloo, NCCL and HCCL.

Each collective carries its timeout into the backend. A timeout on the wait alone would leave the backend's own thread
stuck in the collective, and the process could not exit; and a timeout on the group would bind its other users too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from epbackend.dispatch.base import LayerSpec
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.watchdog import unresponsive_ranks
from epbackend.errors import CollectiveError


@dataclass(frozen=True)
class Pending:
    """Rows under way. Holds the sent rows as well, since the backend reads them until the collective ends."""

    _received: Tensor
    _sent: Tensor
    _wait: Callable[[], None]

    def wait(self) -> Tensor:
        """The received rows.

        Raises:
            CollectiveError: they do not come in time.
        """
        self._wait()
        return self._received


def one_ahead(pendings: Iterator[Pending]) -> Iterator[Pending]:
    """Each of them in turn, when the following one is under way already."""
    following = next(pendings, None)
    while following is not None:
        current, following = following, next(pendings, None)
        yield current


@dataclass(frozen=True)
class Collectives:
    """The collectives of one process group on behalf of one layer.

    Raises:
        CollectiveError: from each of them that fails.
    """

    group: Any
    """A dist.ProcessGroup; None for a single rank, which makes no collective."""
    timeout_s: float
    layer: int
    context: GroupContext | None = None
    """Watches the host where it waits for the device."""

    @classmethod
    def of(cls, spec: LayerSpec) -> Collectives:
        """Among the ranks that share the experts."""
        return cls(spec.ranks.group, spec.settings.timeout_s, spec.layer, spec.context)

    @classmethod
    def among_same_tokens(cls, spec: LayerSpec) -> Collectives:
        """Among the ranks that hold the same tokens."""
        return cls(spec.ranks.token_group, spec.settings.timeout_s, spec.layer, spec.context)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def all_gather_ints(self, values_V: Tensor) -> list[list[int]]:
        """The values of each rank; as many on all. Only here does the host wait for values of the device."""
        whole = self.all_gather(values_V[None])
        if self.context is None or self.group is None or not whole.is_cuda:
            return whole.tolist()
        with self.context.waiting(f"sizes of MoE layer {self.layer}", self.group, self.timeout_s):
            return whole.tolist()

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, of equal shapes, concatenated along the first dimension."""
        return self.start_all_gather(part, overlap=False).wait()

    def start_all_gather(self, part: Tensor, *, overlap: bool) -> Pending:
        """Start what `all_gather` does; with `overlap` it goes on beside what follows."""
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        wait = self._start(
            "all_gather",
            c10d.AllgatherOptions(),
            lambda o: self.group._allgather_base(whole, part, o),
            overlap=overlap,
        )
        return Pending(whole, part, wait)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all ranks, in place."""
        self._start("all_reduce", c10d.AllreduceOptions(), lambda o: self.group.allreduce([tensor], o))()

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """This rank's part, along the first dimension, of the sum over all ranks."""
        part = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        self._start(
            "reduce_scatter",
            c10d.ReduceScatterOptions(),
            lambda o: self.group._reduce_scatter_base(part, whole, o),
        )()
        return part

    def start_all_to_all(
        self, rows: Tensor, send_R: Sequence[int] = (), receive_R: Sequence[int] = (), *, overlap: bool
    ) -> Pending:
        """Start to send `send_R[r]` rows to each rank r and to receive `receive_R[r]`.

        Without sizes every rank gets an equal part of the rows. With `overlap` they travel beside what follows.
        """
        received = rows.new_empty(sum(receive_R) if receive_R else len(rows), *rows.shape[1:])
        wait = self._start(
            "all_to_all",
            c10d.AllToAllOptions(),
            lambda o: self.group.alltoall_base(received, rows, list(receive_R), list(send_R), o),
            overlap=overlap,
        )
        return Pending(received, rows, wait)

    def _start(
        self, name: str, options: Any, call: Callable[[Any], Any], *, overlap: bool = False
    ) -> Callable[[], None]:
        """Start a collective; the returned function waits for it.

        With `overlap` NCCL runs it on a stream of its own, beside the kernels that follow, and gloo in threads; else
        NCCL takes the current stream, which needs no events between streams, and `device/cpu_group.py` this thread.
        """
        options.timeout = timedelta(seconds=self.timeout_s)
        options.asyncOp = overlap
        started = time.monotonic()
        try:
            work = call(options)
        except RuntimeError as error:
            raise self._failure(name, started, error) from error

        def wait() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failure(name, started, error) from error

        return wait

    def _failure(self, name: str, started: float, error: RuntimeError) -> CollectiveError:
        seconds = time.monotonic() - started
        left_s = max(0.0, self.timeout_s - seconds)
        return CollectiveError(
            f"{name} of MoE layer {self.layer} failed after {seconds:.1f} s (timeout_s {self.timeout_s:g}): "
            f"{unresponsive_ranks(self.group, left_s)}. The backend said: {error}"
        )
