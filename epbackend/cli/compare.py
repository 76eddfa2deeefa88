"""`epbackend compare`: every algorithm and every split beside each other, on the same loads."""

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from epbackend.cli.inputs import (
    LoadsArgument,
    ObjectiveOption,
    RankSlotsOption,
    RanksOption,
    SlotsOption,
    SpeedOption,
    given_slots,
    given_speeds,
    load_windows,
)
from epbackend.cli.output import JsonOption, console, say, watching
from epbackend.cli.visits import PairsOption, row_model, visit_facts
from epbackend.placement.compare import Row, ScoreTable, score_table
from epbackend.placement.formats.pairs import read_pairs


def compare(
    loads: LoadsArgument,
    ranks: RanksOption,
    slots: SlotsOption = None,
    objective: ObjectiveOption = "tokens",
    node_size: Annotated[int, typer.Option(help="Ranks a node; 0: one node.")] = 0,
    search_ms: Annotated[float, typer.Option(help="Milliseconds a layer for algorithms that search.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of searches and of noisy batches.")] = 0,
    rank_speed: SpeedOption = "",
    rank_slots: RankSlotsOption = "",
    pairs: PairsOption = None,
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out/compare.png"),
    as_json: JsonOption = False,
) -> None:
    """Compare all algorithms and splits: balance, worst layer, noise, drift, time; with pairs, visits and bytes."""
    from epbackend.cli.pictures import check_plot, save_score_table

    check_plot(plot)
    recorded = load_windows(loads)
    together = read_pairs(pairs) if pairs else None
    with watching("comparing") as progress:
        table = score_table(
            recorded,
            ranks=ranks,
            slots=slots,
            objective=objective,
            node_size=node_size,
            search_ms=search_ms,
            seed=seed,
            rank_speed=given_speeds(rank_speed),
            rank_slots=given_slots(rank_slots),
            pairs=together,
            progress=progress,
        )
    picture = save_score_table(table, plot)
    if as_json:
        rows = [row.to_dict() | _visits(row, recorded.experts) for row in table.rows]
        print(json.dumps({"rows": rows, "left_out": dict(table.left_out), "plot": str(picture)}))
        return
    console.print(_table(table, "time of the slowest rank" if rank_speed else "load of the busiest rank"))
    if together is not None:
        console.print(_visits_table(table, recorded.experts))
    for algorithm, reason in table.left_out:
        say(console, f"left out: {algorithm}: {reason}", "dim")
    say(console, f"picture: {picture}", "")


def _visits(row: Row, experts: int) -> dict[str, Any]:
    return {} if row.visits is None else {"visits": visit_facts(row.visits, experts)}


def _table(table: ScoreTable, what: str) -> Table:
    shown = Table(
        box=SIMPLE,
        title=f"{what}, over the mean",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("algorithm", "split"):
        shown.add_column(column, no_wrap=True)
    for column in ("mean", "worst layer", "noise", "heavy noise", "drift", "seconds"):
        shown.add_column(column, justify="right")
    for algorithm, rows in groupby(table.rows, key=lambda row: row.score.algorithm):
        shown.add_section()
        for index, row in enumerate(rows):
            first = (algorithm, f"{row.seconds:.3f}") if index == 0 else ("", "")
            shown.add_row(first[0], row.score.split, *_cells(row), first[1])
    return shown


def _cells(row: Row) -> list[str]:
    """The imbalances of a row; drift needs a second window."""
    judged = row.score
    ratios = (
        judged.imbalance_mean,
        judged.imbalance_worst,
        row.noise_multinomial,
        row.noise_over_dispersed,
        row.drift,
    )
    return ["" if ratio is None else f"{ratio:.4f}" for ratio in ratios]


def _visits_table(table: ScoreTable, experts: int) -> Table:
    """A row for each algorithm, under the split that visits suppose."""
    model = row_model(experts)
    shown = Table(
        box=SIMPLE,
        title=f"a token visits, by its pairs, with split nearest; bytes of {model.name}",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("algorithm", no_wrap=True)
    for column in ("ranks", "nodes", "besides its own", "KB to other nodes", "KB in its node"):
        shown.add_column(column, justify="right")
    for row in table.rows:
        if (visits := row.visits) is not None:
            sizes = visits.bytes_across(model.row_bytes), visits.bytes_within(model.row_bytes)
            counts = (f"{count:.3f}" for count in (visits.ranks, visits.nodes, visits.other_nodes))
            shown.add_row(row.score.algorithm, *counts, *(f"{size / 1e3:.1f}" for size in sizes))
    return shown
