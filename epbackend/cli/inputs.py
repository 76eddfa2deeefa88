"""What the placement commands share: their arguments, and how they describe a placement."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from epbackend.errors import ConfigError
from epbackend.placement.formats import common_numbering, read_loads
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement
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
DenseOption = Annotated[
    str,
    typer.Option(
        metavar="LAYERS", help="Layers without experts, as 0-2 or 0,1,2, for formats that leave them out."
    ),
]


def load_windows(names: list[str], layers: int = 61, experts: int = 256, dense_layers: int = 3) -> Loads:
    """The windows of all files; before them a synthetic one for each time that the word `synthetic` is given.

    These are of a model with so many layers and experts, of DeepSeek-V3 unless given.
    """
    files = [name for name in names if name != SYNTHETIC]
    recorded = [read_loads(files)] if files else []
    if wanted := names.count(SYNTHETIC):
        recorded.insert(0, synthetic_loads(layers, experts, dense_layers=dense_layers, windows=wanted))
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


def unplanned(loads: Loads, ranks: int) -> Placement:
    """The placement without planning: experts in order, and replicas only where ranks would be empty."""
    return Placement.even(loads.layers, loads.experts, ranks, max(loads.experts, ranks))


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
