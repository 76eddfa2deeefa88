"""`Placement`: where every expert of a model lives, and where that decision came from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from epbackend.errors import ConfigError
from epbackend.placement.layout import Layout

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
    """Whatever else was asked of the planner, as (name, plain value), sorted by name."""


@dataclass(frozen=True)
class Placement:
    """Immutable. Row i of `layers` is layer i of the model; a layer without experts (dense) has an even layout.

    Raises ConfigError for layers that disagree on ranks or experts, and for nodes that do not divide the ranks.
    """

    layers: tuple[Layout, ...]
    node_size: int = 0
    """Ranks of a node, whose ranks reach each other faster; 0: all ranks are one node."""
    provenance: Provenance = field(default_factory=lambda: Provenance("even"))

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
    def duplicates_on_rank(self) -> int:
        """Over all layers, slots whose expert has another slot on the same rank."""
        return sum(layer.duplicates_on_rank for layer in self.layers)

    def to_json(self) -> str:
        """Text that `from_json` reads; the same placement always gives the same bytes. One line a layer."""
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
