"""Can all ranks of a group reach each other's GPU memory? They tell each other where they are, once a group.

`ep_level` 2 inside one NVLink domain: rows are stored straight into the memory of their experts' ranks.

No collective library and no size through the host: the kernels of `kernels/triton/peer` count, store and answer, and
the ranks meet on their GPUs. A static call (`DispatchSettings.static`) can be captured in a CUDA graph.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._autograd import DeviceType

from epbackend.device import devices
from epbackend.dispatch.base import Dispatcher, Exchange, LayerSpec, RankGroup
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.settings import UNBOUNDED
from epbackend.errors import ConfigError, UnavailableError

OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Torch's own switch for tests: several ranks on one GPU."""

BACKEND = "CUDA"
"""The allocator of torch's symmetric memory that maps peers' memory into this process; the others need libraries."""


@dataclass(frozen=True)
class Whereabouts:
    """Of one rank, as numbers that can be gathered."""

    host: int
    gpu: int
    """The same for two ranks on one GPU."""


def not_built() -> str | None:
    """Why this torch has no symmetric memory for CUDA; None if it has."""
    try:
        from torch.distributed import _symmetric_memory as symmetric_memory
    except ImportError as error:
        return f"torch {torch.__version__} has no symmetric memory ({error}); it needs torch 2.11 or later"
    found = symmetric_memory.get_backend(torch.device("cuda"))
    if found == BACKEND:
        return None
    if found is None:
        return f"torch {torch.__version__} is built without symmetric memory for CUDA"
    return f"torch's symmetric memory is set to {found}; unset TORCH_SYMMMEM"


@cache
def unreachable(ranks: RankGroup, timeout_s: float) -> str | None:
    """Why the ranks cannot store into each other's memory; None if they can. All ranks ask together.

    Without a process group (`epbackend doctor`) there is nobody to ask: then this machine's GPUs are judged.
    """
    if ranks.group is None:
        return _unreachable_here(ranks.size)
    collectives = Collectives(ranks.group, timeout_s, layer=0)
    device = torch.device("cuda", torch.cuda.current_device())
    mine = Whereabouts(_number(socket.gethostname()), _number(str(_uuid(device.index))))
    places = [Whereabouts(*row) for row in _all_gather(collectives, astuple(mine), device)]
    numbers = dist.get_process_group_ranks(ranks.group)
    if reason := apart(places, numbers, OVERLAP in os.environ):
        return reason
    barred = _all_gather(collectives, (_first_barred(places, device.index),), device)
    for rank, (peer,) in enumerate(barred):
        if peer >= 0:
            return (
                f"the GPU of rank {numbers[rank]} has no NVLink to that of rank {numbers[peer]} "
                "(nvidia-smi topo -m shows the links)"
            )
    return None


def apart(places: Sequence[Whereabouts], numbers: Sequence[int], may_overlap: bool) -> str | None:
    """Why ranks in these places cannot share memory, whatever links them; `numbers` are their names in messages."""
    for rank, place in enumerate(places):
        if place.host != places[0].host:
            return f"ranks {numbers[0]} and {numbers[rank]} are on different hosts"
        twin = places.index(place)
        if twin < rank and not may_overlap:
            return f"ranks {numbers[twin]} and {numbers[rank]} share one GPU (for tests: {OVERLAP}=1)"
    return None


def _unreachable_here(ranks: int) -> str | None:
    """The same for as many of the GPUs of this machine."""
    seen = torch.cuda.device_count()
    if seen < ranks:
        return f"{ranks} ranks that store to each other need as many GPUs in one machine, and this one shows {seen}"
    places = [Whereabouts(0, _number(str(_uuid(index)))) for index in range(ranks)]
    for index in range(ranks):
        if (peer := _first_barred(places, index)) >= 0:
            return f"GPU {index} has no NVLink to GPU {peer} (nvidia-smi topo -m shows the links)"
    return None


def _first_barred(places: Sequence[Whereabouts], mine: int) -> int:
    """The first rank whose GPU this process sees, and whose memory this rank's GPU `mine` cannot reach; -1 if none.

    A process that sees its own GPU alone (CUDA_VISIBLE_DEVICES) cannot tell; then mapping the memory will.
    """
    index_of = {_number(str(_uuid(index))): index for index in range(torch.cuda.device_count())}
    try:
        links = c10d._detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix  # type: ignore[attr-defined]
    except RuntimeError:  # no NVML here
        return -1
    for rank, place in enumerate(places):
        theirs = index_of.get(place.gpu, mine)
        if theirs != mine and not links[mine][theirs]:
            return rank
    return -1


def _all_gather(collectives: Collectives, row: tuple[int, ...], device: torch.device) -> list[list[int]]:
    """Every rank's row."""
    return collectives.all_gather(torch.tensor([row], device=device)).tolist()


def _uuid(index: int) -> object:
    return torch.cuda.get_device_properties(index).uuid


def _number(name: str) -> int:
    """A name as a number that fits int64; equal names give equal numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class Symmetric(Dispatcher):
    name = "symmetric"
    level = 2
    summary = "store rows straight into the peers' memory, sorted by expert"

    @classmethod
    def missing(cls) -> str | None:
        reason = devices()["cuda"].unavailable()
        return super().missing() or (reason and f"it needs device cuda: {reason}") or not_built()

    @classmethod
    def unsupported(cls, spec: LayerSpec) -> str | None:
        """All ranks come to the same answer; the first time they ask each other where they are."""
        if reason := super().unsupported(spec):
            return reason
        if not getattr(spec.kernels, "on_cuda", False):
            return "it needs device cuda with its Triton kernels"
        if spec.settings.static and spec.settings.max_tokens is None:
            return UNBOUNDED
        if spec.settings.transport == "fp8" and not _float8():
            return "transport is fp8, which GPUs older than Ada (8.9) do not have: write int8 or full"
        if reason := not_built():
            return reason
        if cls.name not in spec.settings.dispatcher:
            return "it has not run on a GPU yet, so it is taken only where it is named"
        return unreachable(spec.ranks, spec.settings.timeout_s)

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """Raises ConfigError for more tokens than the phase may have.

        The first call of a shape makes the buffers, and raises UnavailableError on all ranks if one of them cannot.
        """
        from epbackend.dispatch.symmetric_exchange import SymmetricExchange  # imports Triton
        from epbackend.dispatch.symmetric_memory import Room, connect

        room = Room.of(self.spec)
        if room.bounded and len(hidden_TD) > room.tokens:
            raise ConfigError(
                f"MoE layer {self.spec.layer}: {len(hidden_TD)} tokens in a call that may have {room.tokens}; "
                "raise engine.max_batch_size"
            )
        try:
            peers = connect(self.spec.ranks.group, hidden_TD.device, self.spec.settings.timeout_s)
            return SymmetricExchange(self.spec, peers, room, hidden_TD, slot_ids_TK, weights_TK)
        except UnavailableError as error:
            raise UnavailableError(f"MoE layer {self.spec.layer}: {error}") from error


def _float8() -> bool:
    """Whether the GPU converts float8; Triton's interpreter does."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
