"""Ranks that reach each other's memory: how they get it, and how they meet. Torch's symmetric memory maps it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed import distributed_c10d as c10d

from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.symmetric_buffers import Buffers, Geometry
from epbackend.errors import CollectiveError, ConfigError, UnavailableError
from epbackend.kernels.triton.peer.meet import meet
from epbackend.kernels.triton.peer.mirror import Mirror

REPORT_BYTES = 512
"""Of what a rank tells the others when it cannot map their memory."""


class Peers(ABC):
    """This rank's place among ranks that store into each other's memory."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._buffers: dict[Geometry, Buffers] = {}

    def buffers(self, geometry: Geometry) -> Buffers:
        """Those of this geometry, made when first asked for; all ranks ask together.

        One exchange uses them at a time: the next may begin as soon as this one's last meeting is over.
        """
        if geometry not in self._buffers:
            self._buffers[geometry] = Buffers.carve(self.share(geometry.bytes), geometry)
        return self._buffers[geometry]

    @abstractmethod
    def share(self, size: int) -> Mirror:
        """`size` bytes (uint8) on every rank, zeros at first; all ranks ask together."""

    @abstractmethod
    def meet(self, layer: int) -> None:
        """Later kernels of this rank see what every rank stored before; `layer` is for messages.

        Does not wait on the host. Raises CollectiveError if it is known by now that a rank did not come.
        """

    @abstractmethod
    def read(self, tensor: Tensor) -> list:
        """The tensor's values, once the GPU has them; raises CollectiveError if a rank did not come."""


@cache
def connect(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> Peers:
    """The peers of a process group, all of whose ranks call this together; every later call returns the same."""
    return SymmetricMemoryPeers(group, device, timeout_s)


class SymmetricMemoryPeers(Peers):
    """GPUs of one NVLink domain, a process each."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group, self._device, self._timeout_s = group, device, timeout_s
        self._on_gpu = device.type == "cuda"  # else in Triton's interpreter
        self._handles: list[Any] = []  # they keep the peers' memory mapped
        self._signals = _viewed(self.share(8 * self.size), torch.int64)
        self._meeting_1 = torch.zeros(1, dtype=torch.int64, device=device)
        # In the host's memory, so that it can be read when the GPU answers nothing any more.
        self._finding_2 = torch.zeros(2, dtype=torch.int64, pin_memory=self._on_gpu)

    def share(self, size: int) -> Mirror:
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "the first call of a MoE layer allocates memory, which a CUDA graph cannot: make one call of the same "
                "phase before the capture"
            )
        report, mirror = "", None
        with _store_timeout(self._group, self._timeout_s):
            try:
                mirror = self._map(size)
            except RuntimeError as error:
                report = str(error)
        self._agree(report, size)
        assert mirror is not None
        return mirror

    def _map(self, size: int) -> Mirror:
        # `symmetric_memory.empty` may cut several tensors from one block, whose addresses would not be theirs.
        allocate = symmetric_memory._SymmetricMemory.empty_strided_p2p
        mine = allocate((size,), (1,), torch.uint8, self._device).zero_()
        handle = symmetric_memory.rendezvous(mine, self._group)
        self._handles.append(handle)
        if self._on_gpu:
            torch.cuda.synchronize(self._device)  # the zeros are there before any peer writes
        return Mirror(mine, torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=self._device))

    def meet(self, layer: int) -> None:
        with self._explained():
            meet(self._signals, self._meeting_1, self._finding_2, self.rank, layer, self._timeout_s)

    def read(self, tensor: Tensor) -> list:
        with self._explained():
            return tensor.tolist()

    def _agree(self, report: str, size: int) -> None:
        """Raise UnavailableError on every rank if any has something to report."""
        collectives = Collectives(self._group, self._timeout_s, layer=0)
        text = report.encode()[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
        reports = collectives.all_gather(torch.tensor([list(text)], dtype=torch.uint8, device=self._device))
        for rank, line in enumerate(reports.cpu()):
            if told := bytes(line.tolist()).rstrip(b"\0").decode(errors="replace"):
                raise UnavailableError(
                    f"rank {self._global(rank)} cannot share {size >> 20} MiB of GPU memory with its peers: {told}. "
                    "Less may do (alltoall_ep_buffer_scale_factors, engine.max_batch_size), or set dispatcher: alltoall"
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the GPU's error into one that names the rank which did not come."""
        try:
            yield
        except RuntimeError as error:
            self._raise_finding(error)
            raise
        self._raise_finding(None)

    def _raise_finding(self, cause: RuntimeError | None) -> None:
        late, layer = self._finding_2.tolist()
        if late:
            raise CollectiveError(
                f"rank {self._global(late - 1)} did not come to an exchange of MoE layer {layer} within "
                f"timeout_s {self._timeout_s:g}; it died, or waits elsewhere"
            ) from cause

    def _global(self, rank: int) -> int:
        return dist.get_process_group_ranks(self._group)[rank]


@contextmanager
def _store_timeout(group: dist.ProcessGroup, seconds: float) -> Iterator[None]:
    """A rank that waits in vain for another's handle waits for the store: let that end in time."""
    store: Any = c10d._get_process_group_store(group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        store.set_timeout(before)


def _viewed(memory: Mirror, dtype: torch.dtype) -> Mirror:
    return Mirror(memory.mine.view(dtype), memory.addresses_R)
