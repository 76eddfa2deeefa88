"""`epbackend convert`: loads and placements to and from the formats of other programs."""

from pathlib import Path
from typing import Annotated

import typer

from epbackend.cli.inputs import DenseOption, described, layer_numbers, refuse_other_sizes, with_dense
from epbackend.cli.output import console, error_console, say
from epbackend.placement.formats import LOADS, PLACEMENTS, ReadOptions, read, usage, write
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement

NAMES = ", ".join(dict.fromkeys([*PLACEMENTS, *LOADS]))
WITHOUT_DENSE = {"vllm-ascend", "mindie", "omni", "lmdeploy"}
"""Formats for which it matters which layers have no experts."""


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Loads or a placement; the format is recognised.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"One of {NAMES}.")],
    source_format: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help="The format of IN, if it is not to be guessed."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Ranks, where IN does not say (sglang, lmdeploy).")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="For LMDeploy's statistics: convert the placement that its EPLB makes of them, not the loads."
        ),
    ] = None,
    dense_layers: DenseOption = "",
) -> None:
    """Convert loads or a placement. What the other format cannot express is an error that says so."""
    dense = layer_numbers(dense_layers)
    found = read(source, source_format, ReadOptions(ranks, slots, dense))
    if isinstance(found, Placement):
        refuse_other_sizes(found, source, ranks, slots)
    else:
        found = with_dense(found, dense)
    if isinstance(found, Placement) and to in WITHOUT_DENSE and not dense:
        _warn_of_dense(found)
    write(found, target, to, dense)
    say(console, f"{target}: {_summary(found)}, as {to}", "green")
    if isinstance(found, Placement):
        say(console, usage(found, to, target), "")


def _summary(found: Loads | Placement) -> str:
    if isinstance(found, Placement):
        return f"placement of {described(found)}"
    windows = f"{found.windows} window{'s' * (found.windows > 1)}"
    return f"loads of {len(found.loaded_layers)} layers with {found.experts} experts, {windows}"


def _warn_of_dense(placement: Placement) -> None:
    """A planner leaves layers without load in order: most likely they have no experts."""
    even = [layer == Layout.even(layer.experts, layer.ranks, layer.slots) for layer in placement.layers]
    if any(even) and not all(even):
        numbers = ",".join(str(index) for index, found in enumerate(even) if found)
        say(
            error_console,
            f"warning: layers {numbers} are not planned; if they have no experts, say so: --dense-layers {numbers}",
            "yellow",
        )
