"""Plans for engines that give each rank a contiguous block of experts: the order in which experts are to be numbered.

There are no replicas: experts only change places. Where the router chooses groups of experts first (group-limited
routing), an expert stays in its group, and groups move as wholes: the function of the layer is then the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from epbackend.errors import ConfigError, whole_number
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement, Provenance, check_ranks
from epbackend.placement.planners import plan
from epbackend.placement.planners.base import Progress, silent
from epbackend.placement.speeds import checked_speeds


def plan_order(
    loads: Loads,
    *,
    ranks: int,
    nodes: int = 1,
    groups: int = 1,
    rank_speed: Sequence[float] | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """The expert that comes at each place, int64 [Y, E]: rank r then holds places r * E / R to (r + 1) * E / R - 1.

    Ranks are balanced first, then nodes, by which ranks stand together. Layers without load stay in order.

    Args:
        loads: recorded loads; several windows are balanced as their mixture.
        ranks: R, which divide the experts.
        nodes: of equally many ranks each.
        groups: of the router, of equally many experts each; 1 where it chooses among all experts.
        rank_speed: how fast each rank is, in any unit; None: all alike.
        progress: called with (layers done, layers in all), for each step of the plan from 0 again.

    Raises:
        ConfigError: ranks, nodes or groups do not divide what they must, or are moved as wholes though ranks differ in
            speed.
    """
    experts = loads.experts
    check_ranks(whole_number("ranks", ranks, 1))
    for name, parts, whole, of in (
        ("ranks", ranks, experts, "experts"),
        ("nodes", whole_number("nodes", nodes, 1), ranks, "ranks"),
        ("groups", groups, experts, "experts"),
    ):
        if whole % parts:
            raise ConfigError(f"{name}: {parts} do not divide the {whole} {of}; use a divisor")
    group = experts // groups
    for name, parts in (("ranks", ranks), ("nodes", nodes)):
        if parts % groups and groups % parts:
            raise ConfigError(
                f"{name}: {parts} cut through the {groups} groups of the router, which stay whole; use a divisor or a "
                f"multiple of {groups}"
            )
    speeds = checked_speeds(rank_speed, ranks)
    for name, parts in (("nodes", nodes), ("groups", groups)):
        if speeds and parts > 1:
            raise ConfigError(
                f"rank_speed: with {parts} {name} whole ranks or groups change places, as if ranks were alike; leave "
                f"out rank_speed{', or nodes' if name == 'nodes' else ': the groups are those of the model'}"
            )
    order_YE = np.tile(np.arange(experts), (loads.layers, 1))
    unit = 1
    for block in (experts // ranks, experts // nodes):
        scope = group if block <= group else experts
        unit = max(unit, group) if scope > group else unit
        order_YE = _spread(loads, order_YE, unit, block, scope, speeds, progress)
        unit = block
    return order_YE


def in_blocks(order_YE: np.ndarray, ranks: int) -> Placement:
    """The placement of contiguous blocks of experts in this order."""
    layers = tuple(Layout.of(order_E, ranks, len(order_E)) for order_E in order_YE)
    return Placement(layers, provenance=Provenance("contiguous"))


def _spread(
    loads: Loads,
    order_YE: np.ndarray,
    unit: int,
    block: int,
    scope: int,
    rank_speed: tuple[float, ...],
    progress: Progress,
) -> np.ndarray:
    """The order with units of so many places moved within their scope, such that the blocks of a scope are balanced.

    Where ranks differ in speed, blocks are ranks, and the scope all of them.
    """
    layers, experts = order_YE.shape
    bins, units, scopes = scope // block, scope // unit, experts // scope
    if bins == 1 or unit == block:
        return order_YE
    tokens_WYE = np.take_along_axis(loads.tokens_WYE, order_YE[None], axis=2)
    of_units = tokens_WYE.reshape(loads.windows, layers * scopes, units, unit).sum(axis=3)
    planned = plan(
        Loads(of_units, loads.names), ranks=bins, slots=units, rank_speed=rank_speed, progress=progress
    )
    chosen = np.stack([layer.slot_to_expert_P for layer in planned.layers])
    moved = np.take_along_axis(order_YE.reshape(layers * scopes, units, unit), chosen[:, :, None], axis=1)
    return moved.reshape(layers, experts)
