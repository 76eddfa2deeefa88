"""The memory that ranks store into: how big it is, how it is cut into buffers, and how the ranks map it and meet.

Each rank makes one allocation for all layers of the same shape, and torch's symmetric memory maps it into its peers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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
from epbackend.kernels.triton.symmetric import ALIGNMENT, SymmetricTensor, barrier

OPEN_TOKENS = 2048
"""Tokens that a rank sends at a time where nothing bounds a call; longer calls go in several parts."""

OPEN_SCALE = 2.0
"""Receive buffer for those, in multiples of what an even spread fills; what does not fit goes in further rounds."""


@dataclass(frozen=True)
class ExchangeCapacity:
    """What one exchange can hold; the same on all ranks."""

    tokens: int
    """The most tokens that a rank sends."""
    rows: int
    """Rows of a rank's receive buffer."""
    bounded: bool
    """Whether no call has more tokens."""

    @classmethod
    def of(cls, spec: LayerSpec) -> ExchangeCapacity:
        """`buffer_scale_factors` size the receive buffer as MindIE does: int(tokens * top_k * scale) rows.

        Without them the worst case fits where a call's tokens are bounded.

        >>> from epbackend.device import get_device
        >>> from epbackend.dispatch.base import DispatchSettings, RankGroup
        >>> ranks, cpu, settings = RankGroup(None, 0, 8), get_device("cpu"), DispatchSettings(2, max_tokens=128)
        >>> ExchangeCapacity.of(LayerSpec(ranks, cpu, cpu.kernels, settings, slots=32, top_k=8))
        ExchangeCapacity(tokens=128, rows=8192, bounded=True)
        """
        bounded = spec.most_tokens is not None
        tokens = spec.most_tokens or OPEN_TOKENS
        worst = spec.ranks.size
        scale = spec.settings.buffer_scale(tokens, worst if bounded else min(worst, OPEN_SCALE))
        return cls(tokens, max(1, int(tokens * spec.top_k * scale)), bounded)

    def rounds_of(self, rows: int) -> int:
        """How many rounds `rows` rows for one rank need.

        One even without a row: its barriers keep a rank that is ahead from overwriting counts that another rank has yet
        to read with those of the next call.
        """
        return max(1, -(-rows // self.rows))


@dataclass(frozen=True)
class Geometry:
    """The shapes of the buffers; the same on all ranks."""

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
    """What each rank keeps for the others to write into."""

    table: SymmetricTensor
    """int32 [R, P + 1]: of each rank its choices of each slot, and the tokens that it has left."""
    rows: SymmetricTensor
    """[C, width of a row]: what arrives for this rank's experts."""
    choice_of_row: SymmetricTensor
    """int64 [C]: the choice that a row serves, counted over all ranks."""
    results: SymmetricTensor
    """[T * K, D]: the experts' answers to this rank's choices."""

    @classmethod
    def carve(cls, memory: SymmetricTensor, geometry: Geometry) -> Buffers:
        """Lay them out in `memory`, uint8 of `geometry.bytes` on each rank."""
        tensors, offset = [], 0
        for shape, dtype in geometry.fields():
            local = _view(memory.local[offset:], shape, dtype)
            tensors.append(SymmetricTensor(local, memory.peer_ptrs_R + offset))
            offset += _padded_bytes(shape, dtype)
        return cls(*tensors)


def _view(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _padded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


REPORT_BYTES = 512
"""Of the reason that a rank sends to the others when it cannot map their memory."""


class Peers(ABC):
    """This rank's place among ranks that store into each other's memory."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._buffers: dict[Geometry, Buffers] = {}

    def buffers(self, geometry: Geometry) -> Buffers:
        """Those of this geometry, made when first asked for; all ranks ask together.

        One exchange uses them at a time: the next may begin as soon as this one's last barrier is over.
        """
        if geometry not in self._buffers:
            self._buffers[geometry] = Buffers.carve(self.rendezvous(geometry.bytes), geometry)
        return self._buffers[geometry]

    def close(self) -> None:
        """Free the buffers, and unmap those of the peers."""
        self._buffers.clear()

    @abstractmethod
    def rendezvous(self, size: int) -> SymmetricTensor:
        """`size` bytes (uint8) on every rank, zeros at first; all ranks ask together."""

    @abstractmethod
    def barrier(self, layer: int) -> None:
        """Later kernels of this rank see what every rank stored before; `layer` is for messages.

        Does not wait on the host.

        Raises:
            CollectiveError: it is known by now that a rank did not come to this barrier or an earlier one.
        """

    @abstractmethod
    def read(self, tensor: Tensor) -> list:
        """The tensor's values, once the GPU has them.

        Raises:
            CollectiveError: a rank did not come to a barrier before.
        """


class SymmetricMemoryPeers(Peers):
    """GPUs of one NVLink domain, a process each; all ranks of the group make this together."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group, self._device, self._timeout_s = group, device, timeout_s
        self._on_gpu = device.type == "cuda"  # else in Triton's interpreter
        self._handles: list[Any] = []  # they keep the peers' memory mapped
        self._signal_pad: SymmetricTensor | None = _viewed(self.rendezvous(8 * self.size), torch.int64)
        self._barriers_1 = torch.zeros(1, dtype=torch.int64, device=device)
        # In the host's memory, so that it can be read when the GPU answers nothing any more.
        self._timeout_report_2 = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=self._on_gpu)

    def rendezvous(self, size: int) -> SymmetricTensor:
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "the first call of a MoE layer allocates memory, which a CUDA graph cannot: make one call of the same "
                "phase before the capture"
            )
        report, tensor = "", None
        with _store_timeout(self._group, self._timeout_s):
            try:
                tensor = self._map(size)
            except RuntimeError as error:
                report = str(error)
        self._agree(report, size)
        assert tensor is not None
        return tensor

    def close(self) -> None:
        super().close()
        self._signal_pad = None
        self._handles.clear()

    def _map(self, size: int) -> SymmetricTensor:
        # `symmetric_memory.empty` may cut several tensors from one block, whose addresses would not be theirs.
        allocate = symmetric_memory._SymmetricMemory.empty_strided_p2p
        local = allocate((size,), (1,), torch.uint8, self._device).zero_()
        handle = symmetric_memory.rendezvous(local, self._group)
        self._handles.append(handle)
        if self._on_gpu:
            torch.cuda.synchronize(self._device)  # the zeros are there before any peer writes
        return SymmetricTensor(
            local, torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=self._device)
        )

    def barrier(self, layer: int) -> None:
        assert self._signal_pad is not None, "closed"
        with self._explained():
            barrier(
                self._signal_pad,
                self._barriers_1,
                self._timeout_report_2,
                self.rank,
                layer,
                self._timeout_s,
            )

    def read(self, tensor: Tensor) -> list:
        with self._explained():
            return tensor.tolist()

    def _agree(self, report: str, size: int) -> None:
        """Let every rank know what each has to report.

        Raises:
            UnavailableError: on every rank, if one could not map the others' memory.
        """
        collectives = Collectives(self._group, self._timeout_s, layer=0)
        text = report.encode()[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
        reports = collectives.all_gather(torch.tensor([list(text)], dtype=torch.uint8, device=self._device))
        for rank, line in enumerate(reports.cpu()):
            if reason := bytes(line.tolist()).rstrip(b"\0").decode(errors="replace"):
                raise UnavailableError(
                    f"rank {self._global(rank)} cannot share {size >> 20} MiB of GPU memory with its peers: {reason}. "
                    "Less may do (alltoall_ep_buffer_scale_factors, engine.max_batch_size), or set dispatcher: alltoall"
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the GPU's error into one that names the rank which did not come."""
        try:
            yield
        except RuntimeError as error:
            self._raise_timeout(error)
            raise
        self._raise_timeout(None)

    def _raise_timeout(self, cause: RuntimeError | None) -> None:
        late, layer = self._timeout_report_2.tolist()
        if late:
            raise CollectiveError(
                f"rank {self._global(late - 1)} did not come to an exchange of MoE layer {layer} within "
                f"timeout_s {self._timeout_s:g}; it died, or waits elsewhere"
            ) from cause

    def _global(self, rank: int) -> int:
        return dist.get_process_group_ranks(self._group)[rank]


@contextmanager
def _store_timeout(group: dist.ProcessGroup, seconds: float) -> Iterator[None]:
    """A rank that waits for another's handle waits for the store: inside, no longer than `seconds`."""
    store: Any = c10d._get_process_group_store(group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        store.set_timeout(before)


def _viewed(memory: SymmetricTensor, dtype: torch.dtype) -> SymmetricTensor:
    return SymmetricTensor(memory.local.view(dtype), memory.peer_ptrs_R)
