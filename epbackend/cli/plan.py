"""`epbackend plan`: where the experts of a model live, decided on recorded loads."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from epbackend.cli.inputs import (
    DenseOption,
    LoadsArgument,
    ObjectiveOption,
    RankSlotsOption,
    RanksOption,
    SlotsOption,
    SpeedOption,
    algorithm_in_words,
    described,
    given_slots,
    given_speeds,
    layer_numbers,
    load_windows,
    unplanned,
    with_dense,
)
from epbackend.cli.output import JsonOption, console, say, watching
from epbackend.cli.visits import AffinityOption, PairsOption, load_pairs, visit_facts, visits_table
from epbackend.errors import ConfigError
from epbackend.files import check_apart, check_target
from epbackend.names import PLANNERS
from epbackend.placement import planners
from epbackend.placement.affinity import Affinity
from epbackend.placement.formats import ReadOptions, read_placement, write
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import parse_objective
from epbackend.placement.pairs import Pairs
from epbackend.placement.placement import Placement, with_speeds
from epbackend.placement.score import Terms, score
from epbackend.placement.visits import Visits, placement_visits
from epbackend.placement.warmup import warm_up, warm_up_affinity

COMPILED = ("refined", "incremental")
"""Planners that numba compiles."""


def plan(
    loads: LoadsArgument,
    ranks: RanksOption,
    slots: SlotsOption = None,
    algorithm: Annotated[
        str, typer.Option(help=f"{', '.join(PLANNERS.built_in)}, or one that a package adds.")
    ] = "refined",
    objective: ObjectiveOption = "tokens",
    node_size: Annotated[int, typer.Option(help="Ranks a node, for algorithms that care; 0: one node.")] = 0,
    budget: Annotated[
        int | None,
        typer.Option(help="Replicas over all layers, given to layers by need, instead of --slots."),
    ] = None,
    search_ms: Annotated[float, typer.Option(help="Milliseconds a layer to search for a better plan.")] = 0.0,
    current: Annotated[
        Path | None,
        typer.Option(help="The placement in use: incremental starts from it, and moves are counted."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of searches.")] = 0,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="An option of this algorithm alone: topology=ring."
        ),
    ] = None,
    pairs: PairsOption = None,
    affinity: AffinityOption = None,
    rank_speed: SpeedOption = "",
    rank_slots: RankSlotsOption = "",
    dense_layers: DenseOption = "",
    out: Annotated[Path | None, typer.Option(help="Where the placement goes.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where a heat map goes: load by layer and rank.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan where the experts live, on LOADS recorded from a real run."""
    asked: dict[str, Any] = {
        "ranks": ranks,
        "slots": slots,
        "algorithm": algorithm,
        "objective": objective,
        "node_size": node_size,
        "budget": budget,
        "search_ms": search_ms,
        "seed": seed,
        "rank_speed": given_speeds(rank_speed),
        "rank_slots": given_slots(rank_slots),
    }
    if out:
        check_target("out", out)
    if plot:
        # Imported late: matplotlib takes longer to import than most plans take.
        from epbackend.cli.pictures import check_plot

        check_plot(plot)
    inputs = {
        "LOADS": map(Path, loads),
        "--current": filter(None, [current]),
        "--pairs": filter(None, [pairs]),
    }
    check_apart({"out": out, "plot": plot}, inputs)
    dense = layer_numbers(dense_layers)
    recorded = with_dense(load_windows(loads), dense)
    asked["current"] = read_placement(current, ReadOptions(ranks, dense_layers=dense)) if current else None
    counted, gathering = load_pairs(pairs, affinity)
    asked |= _options(extra, asked)
    _plan(recorded, asked, counted, gathering, out, plot, as_json)


def _plan(
    loads: Loads,
    asked: dict[str, Any],
    pairs: Pairs | None,
    affinity: Affinity | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Plans as `planners.plan` is `asked` to, judges the plan on the same loads, and writes and shows it."""
    if affinity:
        warm_up_affinity()
    if asked["algorithm"] in COMPILED:
        warm_up()  # so that the seconds below are of planning, not of loading machine code
    start = time.perf_counter()
    placement = _planned("planning", loads, asked, affinity)
    seconds = time.perf_counter() - start

    reference = asked["current"] or replace(
        unplanned(loads, placement.ranks, asked["rank_slots"] or ()), node_size=placement.node_size
    )
    reference = with_speeds(reference, placement.rank_speed)
    terms = Terms(Terms.of(placement).split, parse_objective(asked["objective"]))
    was, judged = (
        score(each, loads, split=terms.split, objective=terms.objective, baseline=asked["current"])
        for each in (reference, placement)
    )
    result = {**judged.to_dict(), **_more(placement, loads), "seconds": round(seconds, 4)}
    result |= {f"imbalance_before_{of}": getattr(was, f"imbalance_{of}") for of in ("mean", "worst")}
    visits: dict[str, Visits] = {}
    if pairs:
        # On the nodes that are asked for, whatever the placement before was made for.
        named = {algorithm_in_words(reference): replace(reference, node_size=asked["node_size"])}
        if affinity:
            named["balanced"] = _planned("planning without affinity", loads, asked)
        named["planned"] = placement
        visits = {name: placement_visits(each, pairs) for name, each in named.items()}
        result["visits"] = {name: visit_facts(each, placement.experts) for name, each in visits.items()}
    if out:
        write(placement, out, "epbackend")
        result["out"] = str(out)
    if plot:
        from epbackend.cli.pictures import save_before_after

        result["plot"] = str(save_before_after(reference, placement, loads, plot, terms))
    if as_json:
        print(json.dumps(result))
    else:
        _print(result, placement, reference, terms)
        if visits:
            console.print(visits_table(visits, placement.experts))


def _planned(what: str, loads: Loads, asked: dict[str, Any], affinity: Affinity | None = None) -> Placement:
    """`what` is shown meanwhile."""
    with watching(what) as progress:
        return planners.plan(loads, **asked, affinity=affinity, progress=progress)


def _options(extra: list[str] | None, asked: dict[str, Any]) -> dict[str, Any]:
    """NAME=VALUE pairs as a mapping; a value that is not JSON is text."""
    options: dict[str, Any] = {}
    for text in extra or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"option: {text!r} must be NAME=VALUE")
        if name in (*asked, "affinity"):
            raise ConfigError(f"option: {name} has an option of its own, --{name.replace('_', '-')}")
        if name in ("loads", "progress"):
            raise ConfigError(f"option: {name} is no option of an algorithm (loads are the argument LOADS)")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _more(placement: Placement, loads: Loads) -> dict[str, Any]:
    """What `--json` says besides the score."""
    return {
        "slots_over_all_layers": sum(layer.slots for layer in placement.layers),
        "experts": placement.experts,
        "windows": list(loads.names),
    }


def _print(result: dict[str, Any], placement: Placement, before: Placement, terms: Terms) -> None:
    """The result for people, beside the placement before."""
    say(console, f"{result['algorithm']}: {described(placement)}", "bold")
    table = Table(terms.in_words(placement).removeprefix("load of the "), box=SIMPLE)
    for column in (algorithm_in_words(before), "planned", "lower bound"):
        table.add_column(column, justify="right")
    means = (result["imbalance_before_mean"], result["imbalance_mean"], result["lower_bound_mean"])
    table.add_row(f"mean of {result['layers']} layers", *(f"{mean:.4f}" for mean in means))
    table.add_row(
        "worst layer", f"{result['imbalance_before_worst']:.4f}", f"{result['imbalance_worst']:.4f}"
    )
    console.print(table)
    say(
        console,
        f"planned in {result['seconds']} s; two replicas on one rank: {result['duplicates_on_rank']}",
        "",
    )
    if result["moves"] is not None:
        say(console, f"experts to move: {result['moves']}, {result['moves_share']:.1%} of the slots", "")
    for key, what in (("out", "placement"), ("plot", "heat map")):
        if key in result:
            say(console, f"{what}: {result[key]}", "")
