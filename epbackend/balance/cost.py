"""What the experts' layers of a step cost, and what it costs to move experts: computed from bytes and operations.

A layer takes as long as the rank that computes longest, and the rank that receives most. A rank computes its tokens, or
reads the weights of the experts that the batch activates on it, whichever takes longer. It receives a row for each of
its choices, and sends one back; those of its own node by one link, those of other nodes by another, at the same time.
Latencies, attention and everything else that balance does not change are left out.

`benchmarks.cost` has the larger model of the dispatchers, beside figures that others measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from epbackend.errors import ConfigError, unknown_name, whole_number
from epbackend.placement.objectives import activated
from epbackend.placement.placement import Layout
from epbackend.placement.replica_split import expected_shares


@dataclass(frozen=True)
class Machine:
    """Speeds of one GPU."""

    name: str
    flops_s: float
    memory_bytes_s: float
    node_bytes_s: float
    """By the link within a node, sent while as many are received."""
    network_bytes_s: float
    """To other nodes, likewise."""


H100 = Machine("H100", flops_s=650e12, memory_bytes_s=3.0e12, node_bytes_s=360e9, network_bytes_s=48e9)
"""Operations: our FP8 experts of DeepSeek-V3, 65,536 rows, measured (docs/benchmarks.md). Memory: a copy, measured.
Node: 80% of NVLink's 450 GB/s, the share that DeepEP reports for H800 (160 of 200). Network: InfiniBand of 400 Gb/s a
GPU, of which NCCL's maintainers expect 46 to 48 GB/s (NVIDIA/nccl-tests issue 290)."""


@dataclass(frozen=True)
class Model:
    """The routed experts of a model, with FP8 weights in blocks of 128 x 128 that share a float32 scale."""

    name: str
    hidden: int
    width: int
    topk: int
    experts: int
    layers: int
    dense_layers: int

    @property
    def expert_bytes(self) -> int:
        """One expert of one layer: three matrices and their scales."""
        return 3 * (self.hidden * self.width + 4 * (self.hidden // 128) * (self.width // 128))

    @property
    def flops(self) -> int:
        """Operations of one token in one expert."""
        return 6 * self.hidden * self.width

    @property
    def row_bytes(self) -> int:
        """Of one choice: its hidden state out in FP8 with scales, and back in bfloat16."""
        return self.hidden + 4 * (self.hidden // 128) + 2 * self.hidden


MODELS = {
    model.name: model
    for model in (
        Model("deepseek-v3", hidden=7168, width=2048, topk=8, experts=256, layers=61, dense_layers=3),
        Model("kimi-k2", hidden=7168, width=2048, topk=8, experts=384, layers=61, dense_layers=1),
        Model("qwen3-30b", hidden=2048, width=768, topk=8, experts=128, layers=48, dense_layers=0),
    )
}


USUAL = "deepseek-v3"
"""The model of synthetic loads, and what an unknown one is taken to be like."""


def find_model(name: str) -> Model:
    """One of `MODELS`. Raises ConfigError for another name."""
    if name not in MODELS:
        raise unknown_name("model:", name, MODELS)
    return MODELS[name]


class LayerTime(NamedTuple):
    """Seconds of one layer in one step."""

    compute: float
    exchange: float
    imbalance: float
    """Tokens of the busiest rank over the mean; where ranks differ in speed, both over speeds."""


@dataclass(frozen=True)
class CostModel:
    """Prices layers and moves on so many ranks."""

    model: Model
    machine: Machine
    ranks: int
    node_size: int
    """Ranks of a node."""
    tokens: int
    """Tokens that each rank brings to a step."""
    split: str = "even"
    rank_speed: tuple[float, ...] = ()
    """Parts of the machine's speed, as `checked_speeds` gives them; empty: every rank has all of it."""

    def __post_init__(self) -> None:
        """Raises ConfigError for ranks, tokens and nodes that cannot be."""
        whole_number("ranks", self.ranks, 1)
        whole_number("tokens", self.tokens, 1)
        if self.ranks % whole_number("node_size", self.node_size, 1):
            raise ConfigError(
                f"node_size: {self.node_size} ranks a node do not divide the {self.ranks} ranks; use a divisor"
            )

    def layer(self, layout: Layout, tokens_E: np.ndarray) -> LayerTime:
        """A layer whose experts get tokens in these parts, in any unit."""
        speed_R = np.array(self.rank_speed or (1.0,) * self.ranks)
        shares_BP = expected_shares(
            self.split, (tokens_E / tokens_E.sum())[None], layout, self.node_size, self.rank_speed
        )
        choices = self.ranks * self.tokens * self.model.topk
        _, active_P = activated(choices).features(shares_BP[0], 1.0)
        first_R = layout.first_R[:-1]
        share_R, active_R = (np.add.reduceat(each_P, first_R) for each_P in (shares_BP[0], active_P))
        operations_R = share_R * choices * self.model.flops / self.machine.flops_s
        weights_R = active_R * self.model.expert_bytes / self.machine.memory_bytes_s
        bytes_most = share_R.max() * choices * self.model.row_bytes
        across = 1 - self.node_size / self.ranks
        within = (self.node_size - 1) / self.ranks
        exchange = max(
            bytes_most * across / self.machine.network_bytes_s,
            bytes_most * within / self.machine.node_bytes_s,
        )
        return LayerTime(
            float((np.maximum(operations_R, weights_R) / speed_R).max()),
            float(exchange),
            float((share_R / speed_R).max() * speed_R.sum()),
        )

    def moving_s(self, within_R: np.ndarray, across_R: np.ndarray) -> float:
        """Seconds until the last rank has fetched so many experts from its own node, and from others."""
        by_link_2R = np.stack([within_R / self.machine.node_bytes_s, across_R / self.machine.network_bytes_s])
        return float(by_link_2R.max(initial=0.0) * self.model.expert_bytes)


class MovedExperts(NamedTuple):
    """Experts that each rank fetches to get from one layout of a layer to another, int64 [R] both."""

    within_R: np.ndarray
    """From a rank of its own node."""
    across_R: np.ndarray
    """From another node, where its own has none."""


def moved_experts(before: Layout, after: Layout, node_size: int) -> MovedExperts:
    """What a rank did not hold, by where the nearest holder is."""
    held_RE = before.held_RE
    wanted_RE = after.held_RE & ~held_RE
    on_node_ME = np.logical_or.reduceat(held_RE, np.arange(0, before.ranks, node_size), axis=0)
    near_RE = np.repeat(on_node_ME, node_size, axis=0)[: before.ranks]
    return MovedExperts((wanted_RE & near_RE).sum(axis=1), (wanted_RE & ~near_RE).sum(axis=1))
