"""`Layout`, the slots of one layer and the expert in each; and `Placement`, the layouts of a model and their origin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.loads import NUMBERING
from epbackend.placement.speeds import RANK_SPEED, checked_speeds

MOST_RANKS = 1 << 14
"""Far more than share the experts of any model; a larger number is a slip, and would take all memory."""


def check_ranks(ranks: int) -> None:
    """Raises ConfigError for a number of ranks that cannot be."""
    if not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"ranks: {ranks} must be from 1 to {MOST_RANKS}")


def check_slots(slots: int, experts: int, ranks: int) -> None:
    """Raises ConfigError for slots of a layer that are too few or too many for its experts and ranks."""
    for least, what in ((experts, "expert"), (ranks, "rank")):
        if slots < least:
            raise ConfigError(f"slots: {slots} are fewer than the {least} {what}s; every {what} needs one")
    if slots > experts * ranks:
        raise ConfigError(
            f"slots: {slots} are more than {experts * ranks}, a replica of each of {experts} experts on each of "
            f"{ranks} ranks; use fewer"
        )


@dataclass(frozen=True)
class Layout:
    """One layer of a placement: which logical expert is in which slot. The derived arrays are read-only, computed once.

    Slots are numbered from 0 to P - 1 over all ranks, rank by rank, and ranks may have unequal numbers of them. (The
    slot ids of the data path have room for the largest L on every rank, rank = slot // L: they run to R * L, padded.)

    Raises:
        ConfigError: an expert from 0 to experts - 1 has no slot, or a rank has none.
    """

    experts_of_rank: tuple[tuple[int, ...], ...]
    """For each of the R ranks the logical experts in its L slots, in order; lists become tuples."""
    experts: int
    """E: logical experts of the layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts_of_rank", tuple(map(tuple, self.experts_of_rank)))
        if not self.experts_of_rank or self.experts < 1:
            raise ConfigError(
                f"layout: it has {self.ranks} ranks and {self.experts} experts; it needs one of both"
            )
        if () in self.experts_of_rank:
            raise ConfigError(
                f"layout: rank {self.experts_of_rank.index(())} has no slot; give every rank one at least"
            )
        held = set().union(*self.experts_of_rank)
        if not 0 <= min(held) <= max(held) < self.experts:
            outside = min(held) if min(held) < 0 else max(held)
            raise ConfigError(
                f"layout: a slot holds expert {outside}, but experts are numbered 0 to {self.experts - 1}"
            )
        if len(held) < self.experts:
            missing = next(expert for expert in range(self.experts) if expert not in held)
            raise ConfigError(
                f"layout: no slot holds expert {missing} ({self.experts - len(held)} experts have none); place every "
                "expert"
            )

    @classmethod
    def of(cls, slot_to_expert_P: Sequence[int] | np.ndarray, ranks: int, experts: int) -> Layout:
        """Slots in order, cut evenly: rank r holds slots r * P / R to (r + 1) * P / R - 1.

        Raises:
            ConfigError: the ranks do not divide the slots.
        """
        slots = len(slot_to_expert_P)
        if ranks < 1 or slots % ranks:
            raise ConfigError(
                f"slots: {slots} cannot be spread evenly over {ranks} ranks; make them a multiple of the ranks"
            )
        held_RL = np.asarray(slot_to_expert_P, dtype=np.int64).reshape(ranks, slots // ranks)
        return cls(tuple(map(tuple, held_RL.tolist())), experts)

    @classmethod
    def cut(cls, slot_to_expert_P: np.ndarray, first_R: np.ndarray, experts: int) -> Layout:
        """Slots in order, cut unevenly: rank r holds slots first_R[r] to first_R[r + 1] - 1, of R + 1 entries."""
        held, first = slot_to_expert_P.tolist(), first_R.tolist()
        return cls(tuple(tuple(held[a:b]) for a, b in pairwise(first)), experts)

    @classmethod
    def even(cls, experts: int, ranks: int, slots: int | None = None) -> Layout:
        """The layout without planning: experts in order, and again from the first one while slots are left.

        `slots` (P) is E unless given. Ranks get equal numbers of slots, or numbers that differ by one.
        """
        slots = experts if slots is None else slots
        check_ranks(ranks)
        check_slots(slots, experts, ranks)
        return cls.cut(np.arange(slots) % experts, np.arange(ranks + 1) * slots // ranks, experts)

    @classmethod
    def in_order(cls, experts: int, slots_R: Sequence[int]) -> Layout:
        """The layout without planning on ranks with these numbers of slots."""
        return cls.cut(np.arange(sum(slots_R)) % experts, np.cumsum([0, *slots_R]), experts)

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.experts_of_rank)

    @property
    def slots(self) -> int:
        """P: slots over all ranks."""
        return len(self.slot_to_expert_P)

    @property
    def duplicates_on_rank(self) -> int:
        """Slots whose expert has another slot on the same rank: replicas that cannot take load off their rank."""
        return sum(len(held) - len(set(held)) for held in self.experts_of_rank)

    @cached_property
    def slots_R(self) -> np.ndarray:
        """Slots of each rank, int64."""
        return _frozen([len(held) for held in self.experts_of_rank])

    @property
    def first_R(self) -> np.ndarray:
        """The first slot of each rank, and at the end the number of slots, int64 [R + 1]. A new array each time: numba
        would compile once more for a read-only one."""
        return np.concatenate(([0], np.cumsum(self.slots_R)))

    @cached_property
    def slot_to_expert_P(self) -> np.ndarray:
        """The logical expert of every slot, int64."""
        return _frozen([expert for held in self.experts_of_rank for expert in held])

    @cached_property
    def rank_of_slot_P(self) -> np.ndarray:
        """The rank of every slot, int64."""
        return _frozen(np.repeat(np.arange(self.ranks), self.slots_R))

    @property
    def held_RE(self) -> np.ndarray:
        """Which rank holds which expert, bool; a new array each time."""
        held_RE = np.zeros((self.ranks, self.experts), dtype=bool)
        held_RE[self.rank_of_slot_P, self.slot_to_expert_P] = True
        return held_RE

    @cached_property
    def replicas_E(self) -> np.ndarray:
        """How many slots hold each expert, int64."""
        return _frozen(np.bincount(self.slot_to_expert_P, minlength=self.experts))

    @cached_property
    def slots_EC(self) -> np.ndarray:
        """The slots of each expert in ascending order, int64; C is the most replicas, and shorter rows end in -1."""
        slots_EC = np.full((self.experts, int(self.replicas_E.max())), -1)
        order_P = np.argsort(self.slot_to_expert_P, kind="stable")
        first_E = np.cumsum(self.replicas_E) - self.replicas_E
        replica_P = np.arange(self.slots) - np.repeat(first_E, self.replicas_E)
        slots_EC[self.slot_to_expert_P[order_P], replica_P] = order_P
        return _frozen(slots_EC)


def _frozen(values: object) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array


FORMAT = "epbackend-placement"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """How a placement came about: the same inputs give the same placement again, so no date is kept."""

    algorithm: str
    loads: tuple[str, ...] = ()
    """Names of the recorded loads that it was planned on."""
    version: str = ""
    """The epbackend that planned it."""
    options: tuple[tuple[str, Any], ...] = ()
    """Other arguments of the planner, as (name, plain value), sorted by name."""


@dataclass(frozen=True)
class Placement:
    """Immutable. `layers[i]` is layer i of the model; a layer without experts (dense) has an even layout.

    Raises:
        ConfigError: layers differ in ranks or experts, or the nodes do not divide the ranks.
    """

    layers: tuple[Layout, ...]
    node_size: int = 0
    """Ranks of a node, whose ranks reach each other faster; 0: all ranks are one node."""
    provenance: Provenance = field(default_factory=lambda: Provenance("even"))
    rank_speed: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """Speeds of the ranks that it was planned for, as parts of the fastest; empty: all are equally fast."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("placement: it has no layer; give one at least")
        for index, layer in enumerate(self.layers):
            if (layer.ranks, layer.experts) != (self.ranks, self.experts):
                raise ConfigError(
                    f"placement: layer {index} has {layer.experts} experts on {layer.ranks} ranks, but layer 0 has "
                    f"{self.experts} on {self.ranks}; a placement is for one model and one number of ranks"
                )
        if self.node_size < 0 or (self.node_size and self.ranks % self.node_size):
            raise ConfigError(
                f"node_size: {self.node_size} ranks a node do not divide the {self.ranks} ranks; use a divisor, or 0"
            )
        speeds = checked_speeds(dict(self.provenance.options).get(RANK_SPEED), self.ranks)
        object.__setattr__(self, "rank_speed", speeds)

    @classmethod
    def even(cls, layers: int, experts: int, ranks: int, slots: int | None = None) -> Placement:
        """The layout without planning, in every layer."""
        return cls((Layout.even(experts, ranks, slots),) * layers)

    @property
    def ranks(self) -> int:
        """R."""
        return self.layers[0].ranks

    @property
    def experts(self) -> int:
        """E: logical experts of each layer."""
        return self.layers[0].experts

    @property
    def slots(self) -> int | None:
        """P: slots of each layer, or None where layers differ."""
        each = {layer.slots for layer in self.layers}
        return each.pop() if len(each) == 1 else None

    @property
    def numbering(self) -> str | None:
        """By whose numbers it counts experts, as in `Loads`; None: nobody knows."""
        return dict(self.provenance.options).get(NUMBERING)

    def with_options(self, **changes: Any) -> Placement:
        """The same layouts; options of the provenance become these, and those that become None are left out."""
        options = {name: value for name, value in self.provenance.options if name not in changes}
        options |= {name: value for name, value in changes.items() if value is not None}
        return replace(self, provenance=replace(self.provenance, options=tuple(sorted(options.items()))))

    @property
    def duplicates_on_rank(self) -> int:
        """Over all layers, slots whose expert has another slot on the same rank."""
        return sum(layer.duplicates_on_rank for layer in self.layers)

    def to_json(self) -> str:
        """Text that `from_json` reads, with a line for each layer; the same placement always gives the same bytes."""
        head = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "ranks": self.ranks,
            "experts": self.experts,
            "node_size": self.node_size,
            "provenance": {**asdict(self.provenance), "options": dict(self.provenance.options)},
        }
        lines = ",\n".join(
            json.dumps(layer.experts_of_rank, separators=(",", ":"), default=int) for layer in self.layers
        )
        return json.dumps(head, indent=1, sort_keys=True)[:-2] + f',\n "layers": [\n{lines}\n]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """Raises ConfigError for a text that is no placement, naming the field."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"placement: is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f'placement: is not an epbackend placement: "format" must be "{FORMAT}"')
        if data.get("version") != FORMAT_VERSION:
            raise ConfigError(
                f"version: {data.get('version')!r} is unknown; this epbackend reads {FORMAT_VERSION}"
            )
        experts, node_size = (_whole_number(data, name) for name in ("experts", "node_size"))
        layers = tuple(Layout(held, experts) for held in _experts_of_ranks(data.get("layers")))
        placement = cls(layers, node_size, _provenance(data.get("provenance")))
        if placement.ranks != data.get("ranks"):
            raise ConfigError(f"ranks: {data.get('ranks')!r}, but the layers hold {placement.ranks}")
        return placement


def with_speeds(placement: Placement, rank_speed: Sequence[float]) -> Placement:
    """The same layouts, for ranks of these speeds in any unit; the provenance keeps them.

    Raises:
        ConfigError: another number than the ranks, or a speed that is none.
    """
    speeds = checked_speeds(list(rank_speed), placement.ranks)
    return placement.with_options(rank_speed=list(speeds) or None)


def _whole_number(data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{name}: must be a whole number, not {value!r}")
    return value


def _experts_of_ranks(layers: Any) -> list[tuple[tuple[int, ...], ...]]:
    """The "layers" field, checked: lists of lists of lists of whole numbers."""
    if not isinstance(layers, list):
        raise ConfigError("layers: must be a list with one entry a layer")
    for index, ranks in enumerate(layers):
        if not isinstance(ranks, list) or not all(isinstance(held, list) for held in ranks):
            raise ConfigError(f"layers[{index}]: must be a list of ranks, each a list of expert numbers")
        if any(type(expert) is not int for held in ranks for expert in held):
            raise ConfigError(f"layers[{index}]: expert numbers must be whole numbers")
    return [tuple(tuple(held) for held in ranks) for ranks in layers]


def _provenance(data: Any) -> Provenance:
    if not isinstance(data, dict):
        raise ConfigError("provenance: must be an object")
    algorithm, loads = data.get("algorithm"), data.get("loads")
    version, options = data.get("version"), data.get("options")
    if not (isinstance(algorithm, str) and isinstance(version, str) and isinstance(options, dict)):
        raise ConfigError('provenance: needs "algorithm" and "version" (texts) and "options" (an object)')
    if not isinstance(loads, list) or not all(isinstance(name, str) for name in loads):
        raise ConfigError("provenance.loads: must be a list of texts")
    return Provenance(algorithm, tuple(loads), version, tuple(sorted(options.items())))
