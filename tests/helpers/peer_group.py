"""A process group for tests: several ranks on one GPU, by collectives that a CUDA graph can capture.

NCCL before 2.30 refuses two ranks on one GPU, and gloo goes through the host, which no graph can hold. Here each rank
posts its tensor in memory that all can read, they meet, each reads what it needs, and they meet again. On GPUs that
memory is torch's symmetric memory, which lets ranks share a device when TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1; on
a CPU, where this file is tested, it is files in /dev/shm.

    register(); dist.init_process_group(NAME, ...)

One collective at a time, all on one stream. It is as slow as it looks: nothing is to be timed with it.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future

NAME = "peers"
CAPACITY = 16 << 20
"""Bytes of the largest tensor."""
REDUCTIONS = {
    dist.ReduceOp.SUM: lambda stacked: stacked.sum(0),
    dist.ReduceOp.MAX: lambda stacked: stacked.amax(0),
    dist.ReduceOp.MIN: lambda stacked: stacked.amin(0),
}


class Mailbox(ABC):
    """Memory of every rank that all ranks can read."""

    @abstractmethod
    def of_rank(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the rank has posted, or this rank's place to post it."""

    @abstractmethod
    def meet(self) -> None:
        """What was written before is there for all, and what is read after is still there."""


class GpuMailbox(Mailbox):
    """By torch's symmetric memory: ranks meet in a kernel, and the host waits for nothing."""

    def __init__(self, group: PeerGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        allocate = symmetric_memory._SymmetricMemory.empty_strided_p2p
        self._memory = allocate((CAPACITY,), (1,), torch.uint8, device)
        self._handle = symmetric_memory.rendezvous(self._memory, group)

    def of_rank(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._handle.get_buffer(rank, shape, dtype)

    def meet(self) -> None:
        self._handle.barrier(channel=0)


class CpuMailbox(Mailbox):
    """By files in shared memory; gloo lets the ranks meet."""

    def __init__(self, gloo: dist.ProcessGroup, store: dist.Store) -> None:
        self._gloo, rank = gloo, gloo.rank()
        if rank == 0:
            store.set("folder", tempfile.mkdtemp(prefix="epbackend-peers-", dir="/dev/shm"))
        folder = Path(store.get("folder").decode())
        files = [folder / str(each) for each in range(gloo.size())]
        files[rank].touch()
        os.truncate(files[rank], CAPACITY)
        self.meet()
        self._memory = [
            torch.from_file(str(file), shared=True, size=CAPACITY, dtype=torch.uint8) for file in files
        ]
        self.meet()
        files[rank].unlink()
        self.meet()
        if rank == 0:
            folder.rmdir()

    def of_rank(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._memory[rank][: prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def meet(self) -> None:
        self._gloo.barrier().wait()


class PeerGroup(dist.ProcessGroup):
    """The collectives that LMDeploy and epbackend call."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._store = rank, size, store
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._mailboxes: dict[torch.device, Mailbox] = {}
        self._plain: tuple[str, dist.ProcessGroup] | None = None

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        """Of a plain group that has our store and ranks.

        By this name torch's symmetric memory looks for a store in C++, where a group written in Python has none.
        """
        if self._plain is None:
            # Torch's own name for the group is the same on all ranks, and so is this one.
            self._plain = (
                f"{c10d._world.pg_names[self]}, plain",
                dist.ProcessGroup(self._store, self._rank, self._size),
            )
            c10d._register_process_group(*self._plain)
        return self._plain[0]

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        (tensor,) = tensors
        return self._carry(tensor, tensor, lambda posts: _reduced(posts, opts.reduceOp))

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        (tensor,) = tensors
        return self._carry(tensor, tensor, lambda posts: posts[opts.rootRank])

    def all_gather_single(self, whole: Tensor, part: Tensor, opts: Any = None) -> Any:
        return self._carry(part, whole, lambda posts: torch.stack(posts).view(whole.shape))

    def allgather(self, wholes: list[list[Tensor]], parts: list[Tensor], opts: Any = None) -> Any:
        (whole,), (part,) = wholes, parts
        gathered = part.new_empty(self._size, *part.shape)
        work = self.all_gather_single(gathered, part)
        for target, source in zip(whole, gathered, strict=True):
            target.copy_(source)
        return work

    def reduce_scatter_single(self, part: Tensor, whole: Tensor, opts: Any) -> Any:
        def mine(posts: list[Tensor]) -> Tensor:
            return _reduced([post.view(self._size, -1)[self._rank] for post in posts], opts.reduceOp)

        return self._carry(whole, part, lambda posts: mine(posts).view(part.shape))

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, receive_R: list[int], send_R: list[int], opts: Any = None
    ) -> Any:
        """Without splits in equal parts, which a graph can capture; with splits the ranks read each other's first."""
        if not send_R:
            return self._carry(
                sent,
                received,
                lambda posts: torch.cat([post.view(self._size, -1)[self._rank] for post in posts]).view(
                    received.shape
                ),
            )
        splits = torch.tensor(send_R, device=sent.device)
        table_RR = splits.new_empty(self._size, self._size)
        self.all_gather_single(table_RR, splits)
        rows_RR = table_RR.tolist()
        box = self._mailbox(sent.device)
        box.of_rank(self._rank, sent.shape, sent.dtype).copy_(sent)
        box.meet()
        parts = []
        for rank, rows_R in enumerate(rows_RR):
            first = sum(rows_R[: self._rank])
            post = box.of_rank(rank, (sum(rows_R), *sent.shape[1:]), sent.dtype)
            parts.append(post[first : first + rows_R[self._rank]])
        received.copy_(torch.cat(parts))
        box.meet()
        return _done()

    def barrier(self, opts: Any = None) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._gloo.barrier().wait()
        return _done()

    # The names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def _carry(self, mine: Tensor, target: Tensor, read: Any) -> Any:
        """Post `mine`, and copy what `read` makes of all posts to `target`."""
        box = self._mailbox(mine.device)
        box.of_rank(self._rank, mine.shape, mine.dtype).copy_(mine)
        box.meet()
        target.copy_(read([box.of_rank(rank, mine.shape, mine.dtype) for rank in range(self._size)]))
        box.meet()
        return _done()

    def _mailbox(self, device: torch.device) -> Mailbox:
        if device not in self._mailboxes:
            if device.type == "cuda":
                self._mailboxes[device] = GpuMailbox(self, device)
            else:
                self._mailboxes[device] = CpuMailbox(self._gloo, self._store)
        return self._mailboxes[device]


def register() -> None:
    """Make the backend known to torch.distributed, once a process."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, PeerGroup, devices=["cpu", "cuda"])


def _reduced(posts: list[Tensor], operation: Any) -> Tensor:
    for known, reduce in REDUCTIONS.items():
        if operation == known:
            return reduce(torch.stack(posts))
    raise NotImplementedError(f"{operation} over {NAME}")


def _done() -> Any:
    future: Future = Future()
    future.set_result(None)
    return _create_work_from_future(future)
