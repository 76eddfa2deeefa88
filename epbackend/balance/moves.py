"""From one layout of a layer to another: the parts that flip at once, and the way of every expert that moves.

All here is arithmetic on layouts. A rank keeps its slots, and a slot keeps its place; what changes is the expert in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from epbackend.errors import EPError
from epbackend.placement.placement import Layout, Placement

SAMPLED_ONE_OF = 8
"""Of so many experts one is checked, where checksums are sampled."""


@dataclass(frozen=True)
class Move:
    """The way of one expert: from a slot that holds it into another."""

    expert: int
    source: int
    """The rank that sends it; the target itself where it holds the expert already."""
    source_place: int
    """The slot there, counted from the rank's first."""
    target: int
    target_place: int


@dataclass(frozen=True)
class Migration:
    """What one layer changes between two steps, the same order for all ranks."""

    number: int
    """From 1 on; a later migration has a higher one."""
    layer: int
    before: Layout
    after: Layout
    moves: tuple[Move, ...]
    connection: int = 0
    """Which connections carry it: after a failure the ranks make new ones."""
    checksums: str = "all"
    """Which experts are compared on arrival with what was sent; `balance.checksum`."""
    timeout_s: float = 30.0
    """For staging: nothing has changed before, and nothing changes after it."""
    rank_speed: tuple[float, ...] = ()
    """By which the split `level` goes afterwards."""

    def checks(self, move: Move) -> bool:
        """Whether sender and receiver compute its checksum."""
        if self.checksums == "sampled":
            return (self.number + move.expert) % SAMPLED_ONE_OF == 0  # others in the next migration
        return self.checksums == "all"

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), default=int)

    @classmethod
    def from_json(cls, text: str) -> Migration:
        """The inverse of `to_json`."""
        given = json.loads(text)
        for name in ("before", "after"):
            given[name] = Layout(**given[name])
        given["moves"] = tuple(Move(**move) for move in given["moves"])
        given["rank_speed"] = tuple(given["rank_speed"])
        return cls(**given)


def changes(before: Layout, after: Layout) -> list[tuple[int, int, int]]:
    """(rank, place, expert) of each slot whose expert is another one afterwards.

    Raises:
        EPError: the layouts differ in slots or experts.
    """
    if before.experts != after.experts or not np.array_equal(before.slots_R, after.slots_R):
        raise EPError("a layer keeps its experts and the slots of every rank; plan one with the same")
    return [
        (rank, place, new)
        for rank, (olds, news) in enumerate(zip(before.experts_of_rank, after.experts_of_rank, strict=True))
        for place, (old, new) in enumerate(zip(olds, news, strict=True))
        if old != new
    ]


def parts(before: Layout, after: Layout, most: int) -> list[Layout]:
    """The layouts on the way from `before` to `after`, the last one; no rank takes more than `most` experts at once.

    In each of them every expert has a slot. Experts that change places in a ring move together.

    Raises:
        EPError: a ring needs more at once.

    >>> swap = Layout(((0, 1), (2, 3)), 4), Layout(((2, 3), (0, 1)), 4)
    >>> [each.experts_of_rank for each in parts(*swap, most=1)]
    [((2, 1), (0, 3)), ((2, 3), (0, 1))]
    """
    found, waiting = [], changes(before, after)
    current = before
    while waiting:
        part = _largest_part(current, waiting, most)
        if not part:
            raise EPError(
                f"{len(waiting)} experts of a layer change places in a ring, and a rank can stage {most} at once: "
                "raise balance.staging_mb"
            )
        current = _with(current, part)
        found.append(current)
        waiting = [change for change in waiting if change not in part]
    return found


def _largest_part(
    current: Layout, waiting: list[tuple[int, int, int]], most: int
) -> list[tuple[int, int, int]]:
    """Changes that can be made at once; empty where none can."""
    # An expert that leaves its last slot must arrive elsewhere: so a change brings along what it would lose.
    part: list[tuple[int, int, int]] = []
    for first in waiting:
        if first in part:
            continue
        extended = _closed(current, [*part, first], waiting, most)
        if extended is not None:
            part = extended
    return part


def _closed(
    current: Layout, part: list[tuple[int, int, int]], waiting: list[tuple[int, int, int]], most: int
) -> list[tuple[int, int, int]] | None:
    """The part and what it needs so that every expert keeps a slot; None where a rank would take too many."""
    part = list(part)
    while True:
        taken = Counter(rank for rank, _, _ in part)
        if max(taken.values()) > most:
            return None
        lost = _lost(current, part)
        if not lost:
            return part
        part.append(next(change for change in waiting if change[2] in lost and change not in part))


def _lost(current: Layout, part: list[tuple[int, int, int]]) -> set[int]:
    left = Counter(current.slot_to_expert_P.tolist())
    for rank, place, new in part:
        left[current.experts_of_rank[rank][place]] -= 1
        left[new] += 1
    return {expert for expert, slots in left.items() if slots < 1}


def _with(current: Layout, part: list[tuple[int, int, int]]) -> Layout:
    held = [list(experts) for experts in current.experts_of_rank]
    for rank, place, expert in part:
        held[rank][place] = expert
    return Layout(tuple(map(tuple, held)), current.experts)


def route(
    before: Layout, after: Layout, tokens_R: Sequence[float] | np.ndarray, node_size: int = 0
) -> tuple[Move, ...]:
    """Where each expert that moves comes from: the rank itself, else one on its node, else any that holds it.

    Among equals the one that sends least in this migration, then the one that computes least (`tokens_R`).
    """
    node = node_size or before.ranks
    sends: Counter[int] = Counter()
    found = []
    for target, target_place, expert in changes(before, after):

        def cost(source: int, target: int = target) -> tuple:
            near = source != target, source // node != target // node
            return *near, sends[source], tokens_R[source], source

        holders = [rank for rank, held in enumerate(before.experts_of_rank) if expert in held]
        source = min(holders, key=cost)
        sends[source] += source != target
        place = before.experts_of_rank[source].index(expert)
        found.append(Move(expert, source, place, target, target_place))
    return tuple(found)


def with_layer(placement: Placement, layer: int, layout: Layout) -> Placement:
    """The placement with another layout of one layer."""
    layers = list(placement.layers)
    layers[layer] = layout
    return Placement(tuple(layers), placement.node_size, placement.provenance)
