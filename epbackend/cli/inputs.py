"""What the placement commands share: their arguments, and how they describe a placement."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from epbackend.balance.cost import MODELS, USUAL, Model
from epbackend.errors import ConfigError
from epbackend.placement.formats import common_numbering, read_loads
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement
from epbackend.placement.speeds import parse_speeds
from epbackend.placement.synthetic import synthetic_loads

SYNTHETIC = "synthetic"

_LOADS_HELP = (
    "Recorded loads (JSON or .pt of SGLang, LMDeploy's statistics, a folder of MindIE's hot spots, CSV, npy), each a "
    "window; or the word synthetic: "
    "loads like DeepSeek-V3's. Repeat it for windows that drift."
)
LoadsArgument = Annotated[list[str], typer.Argument(metavar="LOADS...", help=_LOADS_HELP)]
LoadsOption = Annotated[list[str] | None, typer.Argument(metavar="[LOADS...]", help=_LOADS_HELP)]
RanksOption = Annotated[int, typer.Option(help="Ranks that share the experts.")]
SlotsOption = Annotated[
    int | None,
    typer.Option(
        help="Slots of each layer over all ranks; what exceeds the experts are replicas. [default: no replicas]"
    ),
]
ObjectiveOption = Annotated[
    str, typer.Option(help="What is balanced: tokens, activated[:BATCH], or a JSON file of measured times.")
]
SpeedOption = Annotated[
    str,
    typer.Option(
        metavar="SPEEDS",
        help="How fast each rank is, as 1,1,0.5,1, or a JSON file with the list. [default: all alike]",
    ),
]
RankSlotsOption = Annotated[
    str,
    typer.Option(
        metavar="SLOTS", help="Slots of each rank, as 9,9,5,9, where memories differ; instead of --slots."
    ),
]
DenseOption = Annotated[
    str,
    typer.Option(
        metavar="LAYERS", help="Layers without experts, as 0-2 or 0,1,2, for formats that leave them out."
    ),
]


def given_speeds(text: str) -> tuple[float, ...] | None:
    """What `--rank-speed` says; None where it is not given."""
    return parse_speeds(text) if text else None


def given_slots(text: str) -> tuple[int, ...] | None:
    """What `--rank-slots` says; None where it is not given. Raises ConfigError for other than whole numbers."""
    if not text:
        return None
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise ConfigError(f"rank_slots: {text!r} must be a whole number for each rank, as 9,9,5,9")
    return tuple(map(int, text.split(",")))


def load_windows(names: list[str], model: Model = MODELS[USUAL]) -> Loads:
    """The windows of all files; before them a synthetic one for each time that the word `synthetic` is given.

    These have the layers and experts of the model.
    """
    files = [name for name in names if name != SYNTHETIC]
    recorded = [read_loads(files)] if files else []
    if wanted := names.count(SYNTHETIC):
        sizes = {"layers": model.layers, "experts": model.experts, "dense_layers": model.dense_layers}
        recorded.insert(0, synthetic_loads(**sizes, windows=wanted))
    return Loads.of(
        [tokens_YE for loads in recorded for tokens_YE in loads.tokens_WYE],
        [name for loads in recorded for name in loads.names],
        common_numbering(recorded),
    )


def layer_numbers(text: str) -> tuple[int, ...]:
    """The numbers in a text.

    >>> layer_numbers("0-2,7")
    (0, 1, 2, 7)

    Raises:
        ConfigError: the text is something else.
    """
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        first, last = (int(number or found[1]) for number in found.groups()) if found else (1, 0)
        if last < first:
            raise ConfigError(
                f"dense_layers: {part!r} is neither a layer nor a range of them; write 0-2 or 0,1,2"
            )
        numbers += range(first, last + 1)
    return tuple(numbers)


def with_dense(loads: Loads, dense_layers: tuple[int, ...]) -> Loads:
    """The loads of the whole model: where they leave out its layers without experts, these are put back.

    Raises:
        ConfigError: there are no such layers in a model of so many; or some are there without a token, and some not.
    """
    there = set(dense_layers) & (set(range(loads.layers)) - set(loads.loaded_layers))
    if there == set(dense_layers):
        return loads
    if there:
        raise ConfigError(
            f"dense_layers: {sorted(there)} are in the loads without a token, as layers without experts are, but not "
            f"{sorted(set(dense_layers) - there)}; name exactly the layers that have none"
        )
    return loads.with_dense(dense_layers)


def unplanned(loads: Loads, ranks: int, rank_slots: Sequence[int] = ()) -> Placement:
    """The placement without planning: experts in order, and replicas only where ranks would be empty.

    `rank_slots`: where ranks have room for different numbers of experts; all of it is used then.
    """
    if rank_slots:
        return Placement((Layout.in_order(loads.experts, rank_slots),) * loads.layers)
    return Placement.even(loads.layers, loads.experts, ranks, max(loads.experts, ranks))


def refuse_other_sizes(placement: Placement, path: Path, ranks: int | None, slots: int | None = None) -> None:
    """Raises ConfigError for options that say of a file what the file says otherwise."""
    for option, given, there in (("ranks", ranks, placement.ranks), ("slots", slots, placement.slots)):
        if given not in (None, there):
            raise ConfigError(f"{option}: {given} are given, but {path} has {there}; leave the option out")


def slots_in_words(placement: Placement) -> str:
    """The number of slots, for people."""
    if placement.slots is None:
        return f"{sum(layer.slots for layer in placement.layers):,} slots over all layers"
    return f"{placement.slots} slots a layer"


def algorithm_in_words(placement: Placement) -> str:
    """The algorithm that made the placement, for people."""
    algorithm = placement.provenance.algorithm
    return "experts in order" if algorithm == "even" else algorithm


def described(placement: Placement) -> str:
    """The size of a placement, for people."""
    size = f"{len(placement.layers)} layers, {placement.experts} experts in {slots_in_words(placement)}"
    return f"{size} on {placement.ranks} ranks"
