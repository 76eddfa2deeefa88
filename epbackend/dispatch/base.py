"""The contract of a dispatcher: how rows reach the ranks of their experts, and how results come back.

    exchange = dispatcher.begin(hidden_TD, slot_ids_TK, weights_TK)
    for batch in exchange.dispatch():
        exchange.combine(expert_mlp(batch.rows_SD, batch.counts_L))
    out_TD = exchange.finish()

A dispatcher is stateless: what belongs to one layer call lives in its `Exchange`, and what all layers of a process
group share in the `GroupContext`. Every rank makes the same calls, also with no token of its own, because they hold
collectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from epbackend.device.base import Device
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.settings import DispatchSettings
from epbackend.errors import ConfigError
from epbackend.kernels import Kernels, Rows
from epbackend.names import PHASES, DispatcherFacts, Phase

__all__ = ["Batch", "DispatchSettings", "Dispatcher", "Exchange", "LayerSpec", "RankGroup", "padded"]


@dataclass(frozen=True)
class RankGroup:
    """This rank's place among the R ranks that share the experts.

    `token_group` are the ranks that hold the same tokens (attention tensor parallelism), a part of `group`;
    its size 1 means that every rank has tokens of its own. Such a part, whose ranks follow each other in `group`, is a
    *source* of tokens.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    """R."""
    token_group: dist.ProcessGroup | None = None
    token_rank: int = 0
    token_size: int = 1

    @property
    def sources(self) -> int:
        """G: sources of tokens."""
        return self.size // self.token_size

    @property
    def source(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.token_size

    @classmethod
    def single(cls) -> RankGroup:
        """One rank with all experts: no process group, no collectives."""
        return cls(None, 0, 1)

    @classmethod
    def of(cls, group: dist.ProcessGroup, token_group: dist.ProcessGroup | None = None) -> RankGroup:
        """The place of the calling rank in torch process groups that are already set up.

        Raises:
            ConfigError: the ranks of `token_group` are no source.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if token_group is None:
            return cls(group, rank, size)
        token_rank, token_size = dist.get_rank(token_group), dist.get_world_size(token_group)
        members = dist.get_process_group_ranks(group)
        places = [
            members.index(each) if each in members else None
            for each in dist.get_process_group_ranks(token_group)
        ]
        first = rank - token_rank
        if size % token_size or first % token_size or places != [*range(first, first + token_size)]:
            raise ConfigError(
                f"token_group: its ranks have the places {places} in `group`, which has {size}; ranks that hold the "
                f"same tokens follow each other there, and every {token_size} are such a group"
            )
        return cls(group, rank, size, token_group, token_rank, token_size)


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a layer before its first token: enough to choose a dispatcher, and all that it needs."""

    ranks: RankGroup
    device: Device
    kernels: Kernels
    """Of the device; one of its `kernel_sets`."""
    settings: DispatchSettings
    slots: int
    """L: slots of each rank."""
    top_k: int
    """K."""
    hidden_size: int | None = None
    """D, where it is known before the first token."""
    renormalize: bool = False
    """Whether a token's weights are to be divided by their sum; see `Dispatcher.renormalizes`."""
    layer: int = 0
    """Only for messages."""
    context: GroupContext = field(default_factory=GroupContext)
    """What the layer shares with others on the same process groups."""

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that a rank sends in one call, where that is known: ranks that share tokens send a slice."""
        most = self.settings.max_tokens
        return None if most is None else -(-most // self.ranks.token_size)


@dataclass(frozen=True)
class Batch:
    """Rows for this rank's experts, sorted by local slot; rows past `counts_L.sum()` are garbage."""

    rows_SD: Rows
    counts_L: Tensor
    """How many rows each slot has."""
    expected: int | None = None
    """About how many of the rows are valid, from shapes alone and without asking the device; None: all."""


class Exchange(ABC):
    """One layer call under way. What it needs to bring results back is its own, and not in the batches."""

    passes: int = 1
    """Parts that this rank's rows were cut into to keep within the cutoff's bound; known when dispatch ends.
    In a static call as many as the worst routing needs."""
    rounds: int = 1
    """Exchanges that the buffers' sizes asked for; the same on all ranks. In a static call likewise."""

    @abstractmethod
    def dispatch(self) -> Iterator[Batch]:
        """The rows for this rank's experts, batch by batch; each is combined before the next is asked for."""

    @abstractmethod
    def combine(self, rows_SD: Tensor) -> None:
        """Take the experts' results for the batch that `dispatch` gave last, in the order of its rows."""

    @abstractmethod
    def finish(self) -> Tensor:
        """out_TD: for each of this rank's tokens the weighted sum over its choices, in the tokens' dtype."""


class Dispatcher(ABC):
    """One way for rows to travel."""

    name: str
    level: int
    """The `ep_level` that it serves."""
    phases: tuple[Phase, ...] = PHASES
    """Those it serves; without "prefill" it is sized by `DispatchSettings.max_tokens`."""
    needs_all_tokens: bool = False
    """Whether every rank must hold all tokens already."""
    renormalizes: bool = False
    """Whether its exchanges do what `LayerSpec.renormalize` asks for; the layer does it for the others."""
    summary: str
    """What it does, in one line for people."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec

    @classmethod
    def missing(cls) -> str | None:
        """What this machine lacks for it; None if nothing."""
        return None

    @classmethod
    def unsupported(cls, spec: LayerSpec) -> str | None:
        """Why this dispatcher cannot serve the spec; None if it can.

        It makes no collective: the spec, the settings and this machine tell. With the same spec it gives the same
        answer on every rank, or the ranks would choose differently. `spec.ranks` may be without a process group, for
        people who ask before any rank runs.
        """
        if reason := spec.settings.rules_out(DispatcherFacts.of(cls), spec.ranks.sources):
            return reason
        if spec.ranks.size == 1:
            return "there is one rank, so no row travels"
        return None

    @classmethod
    def agree(cls, spec: LayerSpec) -> str | None:
        """Why the ranks find together that it cannot serve them; None if it can. It may hold collectives.

        `choose` calls it on all ranks of a process group together, for every dispatcher that `unsupported` has nothing
        against, in the order of the table. All ranks get the same answer.
        """
        return None

    @classmethod
    def reason(cls, spec: LayerSpec) -> str:
        """What to say for people where it is chosen for the spec."""
        return cls.summary

    def check_tokens(self, tokens: int, most: int) -> None:
        """Raises ConfigError where a call has more tokens than the phase may have."""
        if tokens > most:
            raise ConfigError(
                f"MoE layer {self.spec.layer}: {tokens} tokens in a call that may have {most}; "
                "raise engine.max_batch_size"
            )

    @abstractmethod
    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        """Start one layer call for this rank's tokens; `slot_ids_TK` name slots of all ranks, or -1: none.

        With `settings.static` all ranks bring equally many tokens, and until `finish` has returned nothing is read back
        from the device.
        """


def padded(tensor_TX: Tensor, tokens: int, value: int = 0) -> Tensor:
    """The tensor filled up to so many tokens with `value`."""
    lacking = tokens - len(tensor_TX)
    return pad(tensor_TX, (0, 0, 0, lacking), value=value) if lacking > 0 else tensor_TX
