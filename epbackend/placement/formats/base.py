"""What a file format is: `LoadsFormat` and `PlacementFormat`; and the checks that several formats need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epbackend.errors import ConfigError
from epbackend.placement.formats.file import File
from epbackend.placement.loads import NUMBERING, Loads, check_dense
from epbackend.placement.placement import Layout, Placement, Provenance, check_ranks


@dataclass(frozen=True)
class ReadOptions:
    """What some formats leave out, and the caller has to give."""

    ranks: int | None = None
    """R."""
    slots: int | None = None
    """P of a layer; if given, statistics of LMDeploy are read as the placement that its EPLB makes of them."""
    dense_layers: tuple[int, ...] = ()
    """Layers of the model without experts, which are not in files that number MoE layers only."""

    def need_ranks(self, what: str) -> int:
        """R. Raises ConfigError where it is not given; `what` is the file that does not say it."""
        if self.ranks is None or self.ranks < 1:
            raise ConfigError(f"ranks: {what} does not say how many there are; give them (--ranks)")
        check_ranks(self.ranks)
        return self.ranks


@dataclass(frozen=True)
class LoadsFormat:
    """A format for recorded loads."""

    name: str
    matches: Callable[[File], bool]
    """Whether the content is of this format; a quick look."""
    read: Callable[[File], Loads]
    write: Callable[[Loads], bytes] | None = None
    """None: it can only be read."""
    rank: Callable[[File], object] = lambda file: None
    """The rank that alone was recorded, where a file says so."""


@dataclass(frozen=True)
class PlacementFormat:
    """A format for placements."""

    name: str
    matches: Callable[[File], bool]
    read: Callable[[File, ReadOptions], Placement]
    write: Callable[[Placement, tuple[int, ...]], bytes]
    """From a placement and its dense layers; raises ConfigError for what the format cannot express."""
    usage: Callable[[Placement, str], str]
    """How to give the file of that name to the program whose format it is."""


def checked_numbering(said: object) -> str | None:
    """What a file says under NUMBERING, None where it is silent. Raises ConfigError for other than a text."""
    if said is not None and not isinstance(said, str):
        raise ConfigError(f"{NUMBERING}: must be a text")
    return said


def imported(layers: tuple[Layout, ...], file: File, name: str) -> Placement:
    """The placement of a file that does not say where it comes from."""
    return Placement(
        layers, provenance=Provenance("imported", options=(("file", file.name), ("format", name)))
    )


def layout_of_layer(layer: int, experts_of_rank: list[list[int]], experts: int) -> Layout:
    """A layout whose errors name the layer."""
    try:
        return Layout(tuple(map(tuple, experts_of_rank)), experts)
    except ConfigError as error:
        raise ConfigError(f"layer {layer}: {error}") from None


NumberedLayers = list[tuple[int, Layout]]
"""(number in the model, layer), so that errors can name the number."""


def moe_layers(placement: Placement, dense_layers: tuple[int, ...]) -> NumberedLayers:
    """The layers with experts."""
    check_dense(dense_layers, len(placement.layers))
    return [(index, layer) for index, layer in enumerate(placement.layers) if index not in dense_layers]


def with_dense(layers: list[Layout], dense_layers: tuple[int, ...]) -> tuple[Layout, ...]:
    """All layers of the model: these MoE layers, and even layouts for the dense ones."""
    every = range(len(layers) + len(set(dense_layers)))
    check_dense(dense_layers, len(every))
    even = Layout.even(layers[0].experts, layers[0].ranks, layers[0].slots)
    moe = iter(layers)
    return tuple(even if layer in dense_layers else next(moe) for layer in every)


def check_equal_slots(layers: NumberedLayers, program: str) -> None:
    """Raises ConfigError where layers or ranks differ in slots."""
    for index, layer in layers:
        if layer.slots != layers[0][1].slots or layer.slots_R.min() != layer.slots_R.max():
            raise ConfigError(
                f"layer {index}: has {layer.slots} slots, {layer.slots_R.min()} to {layer.slots_R.max()} a rank; "
                f"{program} needs the same number on every rank and in every layer: plan with slots, not a budget"
            )


def check_no_duplicates(layers: NumberedLayers, program: str) -> None:
    """Raises ConfigError for a layer with two replicas of an expert on one rank."""
    for index, layer in layers:
        if layer.duplicates_on_rank:
            raise ConfigError(
                f"layer {index}: a rank holds two replicas of one expert, which {program} cannot express; plan with "
                "refined or omni"
            )
