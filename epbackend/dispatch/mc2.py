"""`ep_level` 2 on Ascend by CANN's fused operators: rows go straight to their experts, and weighted sums back.

No size travels through the host, so a step never waits for the device. For that, every rank sends the same number of
tokens: the most that a call of this phase may have, padded with masked ones. Communicator and buffer are sized for
them when the first call shows the hidden size; the operators communicate by themselves, on a communicator that no other
traffic may use.

The limits of each chip, and the buffer that is needed, are from the documentation of npu_moe_distribute_dispatch_v2
(https://gitcode.com/Ascend/op-plugin, docs/context), release 7.2.0 (CANN 8.3.RC1) where nothing else is said. On A2
they are those of the algorithm "fullmesh", which serves any number of servers; "hierarchy" would need a newer driver.
The same document wants one communicator for the layers of a model, so its buffer is sized for the largest of them
(`LargestLayer`).
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from epbackend.device import devices
from epbackend.dispatch.base import Batch, Dispatcher, Exchange, LayerSpec, padded
from epbackend.dispatch.settings import UNBOUNDED
from epbackend.errors import ConfigError
from epbackend.kernels.int8 import Int8Rows
from epbackend.kernels.npu import ops

log = logging.getLogger(__name__)

MOST_EXPERTS = 1024
MOST_TOP_K = 16
"""12 for the algorithm fullmesh_v2 of A3, which is not used."""
MEGABYTE = 1 << 20
DEFAULT_BUFFER_MB = 200
"""HCCL's own, and the least that we ask for."""


@dataclass(frozen=True)
class Limits:
    """One chip's."""

    algorithm: str
    """`comm_alg` of the operators."""
    ranks: Container[int]
    ranks_in_words: str
    slots_of_older: int
    """Most experts of a rank before CANN 9.0 (op-plugin 26.0.0), and where it is not known which CANN is here."""
    tokens: int
    """Most tokens of a rank and call."""
    hidden: Container[int]
    hidden_in_words: str


LIMITS = {
    "A2": Limits(
        algorithm="fullmesh",
        ranks=(2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256),
        ranks_in_words="2 to 8, 16, 32, 64, 128 or 256",
        slots_of_older=24,  # 26.0.0 has no such limit
        tokens=256,
        hidden=range(32, 7169, 32),
        hidden_in_words="a multiple of 32 up to 7168",
    ),
    "A3": Limits(
        algorithm="",
        ranks=range(2, 769),
        ranks_in_words="2 to 768",
        slots_of_older=MOST_EXPERTS,
        tokens=512,
        hidden=range(1024, 8193),
        hidden_in_words="1024 to 8192",
    ),
}


UNLIMITED_SINCE = 9
"""CANN's first number that goes with op-plugin 26.0.0 (torch-npu's table of releases)."""


def broken(
    chip: str, ranks: int, slots: int, top_k: int, tokens: int | None, cann: str | None = None
) -> str | None:
    """Which limit a layer of `slots` experts a rank and at most `tokens` tokens a rank breaks; None if none.

    `cann` is its release, None where it is not known: it then counts as an old one.
    """
    limits = LIMITS.get(chip)
    if limits is None:
        return f"it is for {' and '.join(LIMITS)}, and this chip is {chip}"
    if ranks not in limits.ranks:
        return f"on {chip} ep_size must be {limits.ranks_in_words}, and is {ranks}"
    if slots * ranks > MOST_EXPERTS:
        return f"there may be {MOST_EXPERTS} experts with their replicas, and there are {slots * ranks}"
    if slots > limits.slots_of_older and not _since(cann, UNLIMITED_SINCE):
        return (
            f"on {chip} with CANN {cann or 'of an unknown release'} a rank may hold {limits.slots_of_older} experts, "
            f"and holds {slots}: raise ep_size or take CANN {UNLIMITED_SINCE}.0"
        )
    if top_k > MOST_TOP_K:
        return f"a token may choose {MOST_TOP_K} experts, and this model's chooses {top_k}"
    if tokens is None:
        return UNBOUNDED
    if tokens > limits.tokens:
        return f"on {chip} a rank may send {limits.tokens} tokens, and engine.max_batch_size allows {tokens}"
    return None


def _since(cann: str | None, first: int) -> bool:
    """Whether a release, as "8.3.RC1", begins with this number or a later one."""
    number = (cann or "").partition(".")[0]
    return number.isdigit() and int(number) >= first


def broken_width(chip: str, hidden_size: int) -> str | None:
    """Why a model of this hidden size breaks a limit; None if it breaks none."""
    limits = LIMITS[chip]
    if hidden_size in limits.hidden:
        return None
    return f"on {chip} the hidden size must be {limits.hidden_in_words}, and this model's is {hidden_size}"


def buffer_mb(chip: str, ranks: int, slots: int, top_k: int, tokens: int, hidden: int) -> int:
    """The communicator's buffer (HCCL_BUFFSIZE) for 16-bit rows, in MB.

    Args:
        chip: A2 or A3.
        ranks: that share the experts.
        slots: of each rank.
        top_k: choices of a token.
        tokens: the most that a rank sends.
        hidden: values of a row.

    >>> buffer_mb("A3", ranks=32, slots=8, top_k=8, tokens=64, hidden=7168)
    480
    """
    if chip == "A2":
        needed = 2 * (tokens * ranks * min(slots, top_k) * hidden * 2 + 2 * MEGABYTE)
    else:
        sent = slots * tokens * ranks * _align(_align(2 * hidden, 32) + 64, 512)
        returned = (top_k + 1) * tokens * _align(2 * hidden, 512)  # 1: the default shared_expert_num
        needed = 2 * (sent + returned)
    return max(DEFAULT_BUFFER_MB, -(-needed // MEGABYTE))


def _align(size: int, step: int) -> int:
    return -(-size // step) * step


@dataclass(eq=False)
class LargestLayer:
    """What any layer on a group needs at most. Layers are made before the first call, which makes the communicator."""

    group: dist.ProcessGroup
    slots: int = 0
    top_k: int = 0
    tokens: int = 0
    buffer_mb: int = 0
    """Of the communicator, once that is made."""

    @classmethod
    def on(cls, spec: LayerSpec) -> LargestLayer:
        assert spec.ranks.group is not None
        return spec.context.get(cls, spec.ranks.group)

    def include(self, slots: int, top_k: int, tokens: int) -> None:
        self.slots, self.top_k = max(self.slots, slots), max(self.top_k, top_k)
        self.tokens = max(self.tokens, tokens)


class FusedCommunicator:
    """A new HCCL communicator among the ranks of `group`, which make it together, with a buffer of `buffer_mb`."""

    def __init__(self, group: dist.ProcessGroup, buffer_mb: int) -> None:
        # The backend alone, without a process group around it. dist.new_group would want every rank of the world; its
        # use_local_synchronization does not, but names the group by how many groups each rank is in, and ranks need not
        # agree about that.
        rank, store = dist.get_rank(group), c10d._get_process_group_store(group)
        name = f"epbackend_fused_{group.group_name}_{buffer_mb}"
        # Another context may have made one before: ranks count them in the same order, each for itself.
        name += f"_{store.add(f'{name}/{rank}', 1)}"
        ranks = dist.get_process_group_ranks(group)
        self._backend = ops.hccl_backend(dist.PrefixStore(name, store), name, ranks, rank, buffer_mb)
        self.name: str = self._backend.get_hccl_comm_name(rank)

    def close(self) -> None:
        self._backend = None


DTYPES = (torch.bfloat16, torch.float16)
FEWEST_ON_A2 = 16


class Mc2(Dispatcher):
    name = "mc2"
    level = 2
    phases = ("decode",)
    summary = "CANN's fused dispatch and combine, without a size through the host"

    @classmethod
    def missing(cls) -> str | None:
        reason = devices()["ascend"].unavailable()
        return super().missing() or (reason and f"it needs device ascend: {reason}")

    @classmethod
    def unsupported(cls, spec: LayerSpec) -> str | None:
        chip = spec.device.chip
        if chip is None:
            return "it needs an Ascend NPU (device ascend)"
        if reason := super().unsupported(spec):
            return reason
        if spec.settings.dispatch_dtype == "fp8":
            return "it sends rows in full or in int8, and dispatch_dtype is fp8"
        ranks, slots = spec.ranks.size, spec.slots
        if chip == "A2" and ranks < FEWEST_ON_A2 and not spec.settings.dispatcher:
            return (
                f"on A2 it is for {FEWEST_ON_A2} ranks and more, and there are {ranks}: older CANN takes no fewer, "
                "so name it (dispatcher: mc2) where yours does"
            )
        if reason := broken(chip, ranks, slots, spec.top_k, spec.most_tokens, spec.device.release):
            return reason
        return None if spec.hidden_size is None else broken_width(chip, spec.hidden_size)

    @classmethod
    def reason(cls, spec: LayerSpec) -> str:
        chip, form = str(spec.device.chip), ", in int8" if spec.settings.dispatch_dtype == "int8" else ""
        most, tokens = LIMITS[chip].tokens, spec.most_tokens
        return f"{cls.summary}: {chip} takes {most} tokens a rank, and {tokens} are sent{form}"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        LargestLayer.on(spec).include(spec.slots, spec.top_k, spec.most_tokens or 0)

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """See `Dispatcher.begin`. A token must choose each slot at most once, which the router's top-k sees to.

        Raises:
            ConfigError: the model, or the number of tokens, is outside of the operators' limits.
        """
        tokens = self.spec.most_tokens
        assert tokens is not None  # else `unsupported` gave a reason
        self.check_tokens(len(hidden_TD), tokens)
        _check(hidden_TD, self.spec.device.chip)
        group = _group(self.spec, hidden_TD.shape[1], tokens)
        return _Mc2Exchange(
            group, hidden_TD, slot_ids_TK, weights_TK, self.spec.settings.dispatch_dtype == "int8"
        )


class _Mc2Exchange(Exchange):
    def __init__(
        self, group: ops.FusedGroup, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, int8: bool
    ) -> None:
        self._group, self._int8 = group, int8
        self._tokens, self._dtype = len(hidden_TD), hidden_TD.dtype
        self._hidden_TD = padded(hidden_TD, group.tokens)
        self._weights_TK = padded(weights_TK.float(), group.tokens)
        ids_TK = padded(slot_ids_TK.int(), group.tokens, -1)
        self._active_T = ids_TK[:, 0] >= 0
        # Masked tokens, too, must name experts, and different ones.
        valid_K = torch.arange(ids_TK.shape[1], dtype=torch.int32, device=ids_TK.device)
        self._ids_TK = torch.where(self._active_T[:, None], ids_TK, valid_K)

    def dispatch(self) -> Iterator[Batch]:
        sent = ops.moe_dispatch(self._hidden_TD, self._ids_TK, self._active_T, self._group, self._int8)
        rows_SD = sent.rows_SD if sent.scale_S is None else Int8Rows(sent.rows_SD, sent.scale_S, self._dtype)
        self._sent = sent
        yield Batch(rows_SD, sent.counts_L)

    def combine(self, rows_SD: Tensor) -> None:
        self._out_TD = ops.moe_combine(
            rows_SD, self._ids_TK, self._weights_TK, self._active_T, self._sent, self._group
        )

    def finish(self) -> Tensor:
        return self._out_TD[: self._tokens]


def _group(spec: LayerSpec, hidden: int, tokens: int) -> ops.FusedGroup:
    ranks, chip = spec.ranks, spec.device.chip
    assert chip is not None  # else `unsupported` gave a reason
    assert ranks.group is not None
    largest = LargestLayer.on(spec)
    needed = buffer_mb(chip, ranks.size, largest.slots, largest.top_k, largest.tokens, hidden)
    if not largest.buffer_mb:
        largest.buffer_mb = needed
        log.info(
            "dispatcher mc2: a communicator with a buffer of %d MB; where the operators find it too small, "
            "export HCCL_BUFFSIZE=%d before the start",
            needed,
            needed,
        )
    elif needed > largest.buffer_mb:
        raise ConfigError(
            f"dispatcher mc2: a layer was made after the first call, and needs a buffer of {needed} MB where the "
            f"communicator of all has {largest.buffer_mb} MB: make all layers first, or give it a context of its own"
        )
    communicator = spec.context.get(FusedCommunicator, ranks.group, largest.buffer_mb).name
    algorithm = LIMITS[chip].algorithm
    return ops.FusedGroup(communicator, ranks.rank, ranks.size, spec.slots, tokens, algorithm)


def _check(hidden_TD: Tensor, chip: str | None) -> None:
    """Check what only a call can show to be outside of the limits.

    Raises:
        ConfigError: something is.
    """
    if reason := broken_width(str(chip), hidden_TD.shape[1]):
        raise ConfigError(f"dispatcher mc2: {reason}; set dispatcher: alltoall")
    if hidden_TD.dtype not in DTYPES:
        raise ConfigError(
            f"dispatcher mc2: it takes bfloat16 and float16, not {str(hidden_TD.dtype).removeprefix('torch.')}; "
            "set engine.dtype: bfloat16, or dispatcher: alltoall"
        )
