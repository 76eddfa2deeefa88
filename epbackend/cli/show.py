"""`epbackend show`: what a placement holds, and what it does to the load of each rank."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from epbackend.cli.inputs import (
    DenseOption,
    LoadsOption,
    algorithm_in_words,
    described,
    layer_numbers,
    load_windows,
    refuse_other_sizes,
    unplanned,
    with_dense,
)
from epbackend.cli.output import console, say
from epbackend.cli.pictures import check_plot, save_before_after, save_traffic
from epbackend.cli.visits import PairsOption, visits_table
from epbackend.files import check_apart
from epbackend.placement.formats import ReadOptions, read_placement
from epbackend.placement.formats.pairs import read_pairs
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS
from epbackend.placement.pairs import Pairs
from epbackend.placement.placement import Placement, with_speeds
from epbackend.placement.score import Terms, check_loads_of, mean_busiest_Y
from epbackend.placement.visits import placement_visits

WORST = 5
"""Layers in the table."""


def show(
    placement: Annotated[
        Path, typer.Argument(metavar="PLACEMENT", help="A placement in any format that is known.")
    ],
    loads: LoadsOption = None,
    plot: Annotated[
        Path,
        typer.Option(
            help="Where the heat map goes, if there are loads: load by layer and rank, before and after."
        ),
    ] = Path("out/placement.png"),
    ranks: Annotated[int | None, typer.Option(help="Ranks, where the file does not say (sglang).")] = None,
    dense_layers: DenseOption = "",
    pairs: PairsOption = None,
    traffic: Annotated[
        Path,
        typer.Option(help="Where the picture of the traffic between nodes goes, if there are pairs."),
    ] = Path("out/traffic.png"),
) -> None:
    """Show a placement; with LOADS, the load of each rank without it and with it."""
    check_apart({"traffic": traffic if pairs else None, "plot": plot if loads else None}, {})
    dense = layer_numbers(dense_layers)
    found = read_placement(placement, ReadOptions(ranks, dense_layers=dense))
    refuse_other_sizes(found, placement, ranks)
    if pairs:
        check_plot(traffic, "traffic")
    if loads:
        check_plot(plot)
    say(console, f"{placement}: {described(found)}", "bold")
    say(console, _origin(found), "")
    say(console, _replicas(found), "")
    counted = read_pairs(pairs) if pairs else None
    if counted:
        _show_visits(found, counted, traffic)
    if not loads:
        say(console, "Give recorded LOADS as well to see what it does to them.", "dim")
        return
    recorded = with_dense(load_windows(loads), dense)
    check_loads_of(found, recorded)
    slots_R = found.layers[0].slots_R.tolist()
    before = unplanned(recorded, found.ranks, slots_R if max(slots_R) > min(slots_R) + 1 else ())
    before = with_speeds(replace(before, node_size=found.node_size), found.rank_speed)
    terms = Terms.of(found)
    if (planned_for := dict(found.provenance.options).get("objective", TOKENS.name)) != terms.objective.name:
        say(
            console,
            f"judged by tokens: {planned_for}, which it was planned for, is not in the file",
            "yellow",
        )
    console.print(_table(before, found, recorded, terms))
    say(console, f"heat map: {save_before_after(before, found, recorded, plot, terms)}", "")


def _show_visits(placement: Placement, pairs: Pairs, path: Path) -> None:
    """Beside those of the experts in order, on the same nodes."""
    in_order = unplanned(Loads.of(pairs.loads_YE), placement.ranks)
    before = replace(in_order, node_size=placement.node_size)
    named = {
        algorithm_in_words(before): placement_visits(before, pairs),
        placement.provenance.algorithm: placement_visits(placement, pairs),
    }
    console.print(visits_table(named, placement.experts))
    if placement.node_size not in (0, placement.ranks):
        say(console, f"traffic between nodes: {save_traffic(named, path)}", "")


def _origin(placement: Placement) -> str:
    provenance = placement.provenance
    options = "".join(f", {name} {value}" for name, value in provenance.options)
    version = f" of epbackend {provenance.version}" if provenance.version else ""
    loads = f", planned on {', '.join(provenance.loads)}" if provenance.loads else ""
    return f"algorithm: {provenance.algorithm}{version}{options}{loads}"


def _replicas(placement: Placement) -> str:
    copied = [int((layer.replicas_E > 1).sum()) for layer in placement.layers]
    most = max(int(layer.replicas_E.max()) for layer in placement.layers)
    each = np.concatenate([layer.slots_R for layer in placement.layers])
    return (
        f"in a layer: {_span(each.min(), each.max())} slots a rank, {_span(min(copied), max(copied))} experts with "
        f"replicas, at most {most} of one; two on one rank: {placement.duplicates_on_rank}"
    )


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _table(before: Placement, after: Placement, loads: Loads, terms: Terms) -> Table:
    """The busiest rank of the layers that are worst, and of all layers; over the windows, each with its own."""
    was_Y, is_Y = (mean_busiest_Y(terms.ratios_YWR(each, loads)) for each in (before, after))
    table = Table("layer", title=terms.in_words(after), title_justify="left")
    for name in ("experts in order", after.provenance.algorithm):
        table.add_column(name, justify="right")
    for index in np.argsort(-is_Y, kind="stable")[:WORST]:
        table.add_row(str(loads.loaded_layers[index]), f"{was_Y[index]:.4f}", f"{is_Y[index]:.4f}")
    table.add_section()
    table.add_row(f"mean of {len(is_Y)}", f"{was_Y.mean():.4f}", f"{is_Y.mean():.4f}", style="bold")
    return table
