"""What a placement makes tokens visit, as `plan` and `show` say it: the options, a table, and facts for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from epbackend.balance.cost import MODELS, USUAL, Model
from epbackend.errors import ConfigError
from epbackend.placement.affinity import Affinity
from epbackend.placement.formats.pairs import read_pairs
from epbackend.placement.pairs import Pairs
from epbackend.placement.visits import Visits

PairsOption = Annotated[
    Path | None,
    typer.Option(
        help="Recorded pairs (epbackend record --pairs), JSON or npz: shows how many ranks and nodes a token visits."
    ),
]
AffinityOption = Annotated[
    float | None,
    typer.Option(
        help="With --pairs: plan for fewer nodes and ranks that a token visits, as long as the busiest rank is not "
        "above this many times the mean: 1.02, say."
    ),
]


def load_pairs(pairs: Path | None, affinity: float | None) -> tuple[Pairs | None, Affinity | None]:
    """What the two options say. Raises ConfigError for a limit without pairs, and for pairs that cannot be."""
    if pairs is None:
        if affinity is not None:
            raise ConfigError(
                "affinity: needs --pairs FILE, which experts are chosen together; record it (epbackend record --pairs)"
            )
        return None, None
    recorded = read_pairs(pairs)
    return recorded, None if affinity is None else Affinity(recorded, affinity)


def row_model(experts: int) -> Model:
    """The known model with so many experts, for the bytes of a row."""
    return next((model for model in MODELS.values() if model.experts == experts), MODELS[USUAL])


def visit_facts(visits: Visits, experts: int) -> dict[str, Any]:
    """For `--json`."""
    model = row_model(experts)
    return {
        "ranks": round(visits.ranks, 4),
        "nodes": round(visits.nodes, 4),
        "other_nodes": round(visits.other_nodes, 4),
        "bytes_across": round(visits.bytes_across(model.row_bytes)),
        "bytes_within": round(visits.bytes_within(model.row_bytes)),
        "rows_of": model.name,
        "nodes_from_to": visits.nodes_MM.round(4).tolist(),
    }


def visits_table(named: dict[str, Visits], experts: int) -> Table:
    """A column for each placement."""
    model = row_model(experts)
    table = Table("a token visits, by its pairs", *named, box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    columns = list(named.values())
    table.add_row("ranks", *(f"{visits.ranks:.3f}" for visits in columns))
    if len(columns[0].nodes_MM) > 1:
        table.add_row("nodes", *(f"{visits.nodes:.3f}" for visits in columns))
        table.add_row("nodes besides its own", *(f"{visits.other_nodes:.3f}" for visits in columns))
        across = (visits.bytes_across(model.row_bytes) for visits in columns)
        table.add_row(f"KB to other nodes, {model.name}", *(f"{size / 1e3:.1f}" for size in across))
    within = (visits.bytes_within(model.row_bytes) for visits in columns)
    table.add_row(f"KB in its node, {model.name}", *(f"{size / 1e3:.1f}" for size in within))
    return table
