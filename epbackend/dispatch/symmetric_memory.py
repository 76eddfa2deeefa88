"""What each rank keeps for the others to write into: one allocation, shared by all layers of the same shape.

Ranks that reach each other's memory: how they get it, and how they meet. Torch's symmetric memory maps it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed import distributed_c10d as c10d

from epbackend.dispatch.base import LayerSpec
from epbackend.dispatch.collectives import Collectives
from epbackend.errors import CollectiveError, ConfigError, UnavailableError
from epbackend.kernels.triton.symmetric import ALIGNMENT, Mirror, meet

OPEN_TOKENS = 2048
"""Tokens that a rank sends at a time where nothing bounds a call; longer calls go in several parts."""

OPEN_SCALE = 2.0
"""Receive buffer for those, in shares of what an even spread would fill: what does not fit goes in further rounds."""


@dataclass(frozen=True)
class Room:
    """What one exchange can hold; the same on all ranks."""

    tokens: int
    """The most tokens that a rank sends."""
    rows: int
    """Rows of a rank's receive buffer."""
    bounded: bool
    """Whether no call has more tokens."""

    @classmethod
    def of(cls, spec: LayerSpec) -> Room:
        """`buffer_scale_factors` size the receive buffer as MindIE does: int(tokens * top_k * scale) rows.

        Without them there is room for the worst case where a call's tokens are bounded.

        >>> Room.of(LayerSpec(RankGroup(None, 0, 8), None, DispatchSettings(2, max_tokens=128), slots=32, top_k=8))
        Room(tokens=128, rows=8192, bounded=True)
        """
        settings, ranks = spec.settings, spec.ranks
        bounded = spec.most_tokens is not None
        tokens = spec.most_tokens or OPEN_TOKENS
        usual = ranks.size if bounded else min(ranks.size, OPEN_SCALE)
        scale = next((scale for length, scale in settings.buffer_scale_factors if length <= tokens), usual)
        return cls(tokens, max(1, int(tokens * spec.top_k * scale)), bounded)

    def rounds_of(self, rows: int) -> int:
        """How many rounds `rows` rows for one rank need.

        One even without a row: its meetings keep a rank that is ahead from writing the next call's counts over those
        that another has yet to read.
        """
        return max(1, -(-rows // self.rows))


@dataclass(frozen=True)
class Geometry:
    """The shapes; the same on all ranks."""

    ranks: int
    slots: int
    """Of each rank."""
    choices: int
    """The most choices that a rank sends at a time."""
    rows: int
    """The most rows that a rank receives at a time."""
    row: tuple[int, torch.dtype]
    """Elements and dtype of a row on its way to the experts."""
    result: tuple[int, torch.dtype]
    """The same of a result on its way back."""

    def fields(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """(shape, dtype) of each buffer, in the order of `Buffers`."""
        return (
            ((self.ranks, self.ranks * self.slots + 1), torch.int32),
            ((self.rows, self.row[0]), self.row[1]),
            ((self.rows,), torch.int64),
            ((self.choices, self.result[0]), self.result[1]),
        )

    @property
    def bytes(self) -> int:
        """Of all buffers of one rank.

        >>> deepseek = 7168, torch.bfloat16
        >>> Geometry(8, 32, choices=128 * 8, rows=8 * 128 * 8, row=deepseek, result=deepseek).bytes >> 20
        126
        """
        return sum(_padded_bytes(*field) for field in self.fields())


@dataclass(frozen=True)
class Buffers:
    """Of one rank, with the addresses of all."""

    table: Mirror
    """int32 [R, P + 1]: of each rank its choices of each slot, and the tokens that it has left."""
    rows: Mirror
    """[C, width of a row]: what arrives for this rank's experts."""
    sources: Mirror
    """int64 [C]: the choice, among all ranks' choices, that a row serves."""
    results: Mirror
    """[T * K, D]: the experts' answers to this rank's choices."""

    @classmethod
    def carve(cls, memory: Mirror, geometry: Geometry) -> Buffers:
        """Lay them out in `memory`, uint8 of `geometry.bytes` on each rank."""
        mirrors, offset = [], 0
        for shape, dtype in geometry.fields():
            mine = _view(memory.mine[offset:], shape, dtype)
            mirrors.append(Mirror(mine, memory.addresses_R + offset))
            offset += _padded_bytes(shape, dtype)
        return cls(*mirrors)


def _view(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _padded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


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
