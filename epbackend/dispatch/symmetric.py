"""`ep_level` 2 inside one NVLink domain: rows are stored straight into the memory of their experts' ranks.

No collective library and no size through the host: the kernels of `kernels/triton/symmetric.py` count, store and
answer, and the ranks meet at barriers on their GPUs. A static call (`DispatchSettings.static`) can be captured in a
CUDA graph.

Whether all GPUs of a group can access each other's memory the ranks find out together, once a group, before the
dispatcher is chosen.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._autograd import DeviceType

from epbackend.device import devices
from epbackend.dispatch.base import Dispatcher, Exchange, LayerSpec, RankGroup
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.settings import UNBOUNDED
from epbackend.errors import UnavailableError

OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Torch's own switch for tests: several ranks on one GPU."""

BACKEND = "CUDA"
"""The allocator of torch's symmetric memory that maps peers' memory into this process; the others need libraries."""


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
        if reason := super().unsupported(spec):
            return reason
        if spec.device.name != "cuda":
            return f"it needs device cuda, and the device is {spec.device.name}"
        if spec.settings.static and spec.settings.max_tokens is None:
            return UNBOUNDED
        if spec.settings.dispatch_dtype == "fp8" and not _float8():
            return "dispatch_dtype is fp8, which GPUs older than Ada (8.9) do not have: write int8 or full"
        if reason := not_built():
            return reason
        if cls.name not in spec.settings.dispatcher:
            return "it has run between two ranks on one GPU only, so it is taken only where it is named"
        return no_p2p_access_here(spec.ranks.size) if spec.ranks.group is None else None

    @classmethod
    def agree(cls, spec: LayerSpec) -> str | None:
        """Whether the ranks' GPUs can access each other's memory: asked once for all layers of the context."""
        return spec.context.get(no_p2p_access, spec.ranks, spec.settings.timeout_s)

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """See `Dispatcher.begin`. The first call of a shape makes the buffers.

        Raises:
            ConfigError: there are more tokens than the phase may have.
            UnavailableError: a rank cannot make its buffers; it is raised on all ranks.
        """
        from epbackend.dispatch import symmetric_memory  # imports Triton
        from epbackend.dispatch.symmetric_exchange import SymmetricExchange

        spec = self.spec
        capacity = symmetric_memory.ExchangeCapacity.of(spec)
        if capacity.bounded:
            self.check_tokens(len(hidden_TD), capacity.tokens)
        peer_memory = symmetric_memory.SymmetricMemoryPeers
        try:
            peers = spec.context.get(peer_memory, spec.ranks.group, hidden_TD.device, spec.settings.timeout_s)
            return SymmetricExchange(spec, peers, capacity, hidden_TD, slot_ids_TK, weights_TK)
        except UnavailableError as error:
            raise UnavailableError(f"MoE layer {spec.layer}: {error}") from error


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


def _float8() -> bool:
    """Whether the GPU converts float8; Triton's interpreter does."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True)
class RankLocation:
    """Where a rank runs, as numbers that can be gathered."""

    host: int
    gpu: int
    """The same for two ranks on one GPU."""


def no_p2p_access(ranks: RankGroup, timeout_s: float) -> str | None:
    """Why the ranks cannot store into each other's memory; None if they can. A collective: all ranks ask together."""
    collectives = Collectives(ranks.group, timeout_s, layer=0)
    device = torch.device("cuda", torch.cuda.current_device())
    mine = RankLocation(_number(socket.gethostname()), _number(str(_uuid(device.index))))
    locations = [RankLocation(*row) for row in _all_gather(collectives, astuple(mine), device)]
    numbers = dist.get_process_group_ranks(ranks.group)
    if reason := location_conflict(locations, numbers, OVERLAP in os.environ):
        return reason
    unlinked = _all_gather(collectives, (_first_unlinked(locations, device.index),), device)
    for rank, (peer,) in enumerate(unlinked):
        if peer >= 0:
            return (
                f"the GPU of rank {numbers[rank]} has no NVLink to that of rank {numbers[peer]} "
                "(nvidia-smi topo -m shows the links)"
            )
    return None


def no_p2p_access_here(ranks: int) -> str | None:
    """The same for as many of the GPUs of this machine, before any rank runs (`epbackend doctor`)."""
    seen = torch.cuda.device_count()
    if seen < ranks:
        return f"{ranks} ranks that store to each other need as many GPUs in one machine, and this one shows {seen}"
    locations = [RankLocation(0, _number(str(_uuid(index)))) for index in range(ranks)]
    for index in range(ranks):
        if (peer := _first_unlinked(locations, index)) >= 0:
            return f"GPU {index} has no NVLink to GPU {peer} (nvidia-smi topo -m shows the links)"
    return None


def location_conflict(
    locations: Sequence[RankLocation], numbers: Sequence[int], may_overlap: bool
) -> str | None:
    """Why ranks at these locations cannot share memory, whatever links them; `numbers` are their names in messages."""
    for rank, location in enumerate(locations):
        if location.host != locations[0].host:
            return f"ranks {numbers[0]} and {numbers[rank]} are on different hosts"
        twin = locations.index(location)
        if twin < rank and not may_overlap:
            return f"ranks {numbers[twin]} and {numbers[rank]} share one GPU (for tests: {OVERLAP}=1)"
    return None


def _first_unlinked(locations: Sequence[RankLocation], mine: int) -> int:
    """The first rank whose GPU this process sees, but this rank's GPU `mine` has no NVLink to; -1 if none.

    A process that sees its own GPU alone (CUDA_VISIBLE_DEVICES) cannot tell; then mapping the memory will.
    """
    index_of = {_number(str(_uuid(index))): index for index in range(torch.cuda.device_count())}
    try:
        links = c10d._detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix  # type: ignore[attr-defined]
    except RuntimeError:  # no NVML here
        return -1
    for rank, location in enumerate(locations):
        theirs = index_of.get(location.gpu, mine)
        if theirs != mine and not links[mine][theirs]:
            return rank
    return -1


def _all_gather(collectives: Collectives, row: tuple[int, ...], device: torch.device) -> list[list[int]]:
    """Every rank's row."""
    return collectives.all_gather(torch.tensor([row], dtype=torch.int64, device=device)).tolist()


def _uuid(index: int) -> object:
    return torch.cuda.get_device_properties(index).uuid


def _number(name: str) -> int:
    """A name as a number that fits int64; equal names give equal numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
