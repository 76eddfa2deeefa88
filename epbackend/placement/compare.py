"""Algorithms and splits side by side in one table: what `epbackend compare` shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.errors import ConfigError
from epbackend.names import LEVEL_BY_NODE, SPLITS
from epbackend.placement.affinity import Affinity
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS, Objective, parse_objective
from epbackend.placement.pairs import Pairs, check_pairs_of
from epbackend.placement.placement import Layout, Placement, Provenance
from epbackend.placement.planners import plan, planner_names
from epbackend.placement.planners.base import Progress, silent
from epbackend.placement.replica_split import expected_shares
from epbackend.placement.score import Score, imbalances, score
from epbackend.placement.speeds import checked_speeds
from epbackend.placement.synthetic import CONCENTRATION, draw_batches
from epbackend.placement.visits import Visits, placement_visits

UNPLANNED = "unplanned"
"""The row of the layout in order, which needs no planner."""
FOR_LEVEL = "refined+level"
"""The row of the default planner, planning for the `level` split."""
WITHOUT_SEARCH = ("eplb", "incremental", "lplb", "omni")
"""Planners that have no use for time to search, and would refuse it."""
FOR_VISITS = "refined+affinity"
"""The row of the default planner where pairs are known: then changed for fewer visits, within the usual limit."""


@dataclass(frozen=True)
class Row:
    """A placement under a split. Noise and drift are imbalances (see `Score`), means over the layers."""

    score: Score
    seconds: float
    """To plan all layers."""
    noise_multinomial: float
    """On batches in which every choice is independent."""
    noise_over_dispersed: float
    """On batches that differ as those of real requests do (see `synthetic.draw_batches`)."""
    drift: float | None
    """Planned on the first window and scored on the later ones; None with a single window."""
    visits: Visits | None = None
    """Of a mean token by its pairs; they suppose the split `nearest`, and no other row has them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, not nested, for JSON; without the visits."""
        own = {name: value for name, value in vars(self).items() if name not in ("score", "visits")}
        return {**self.score.to_dict(), **own}


@dataclass(frozen=True)
class ScoreTable:
    """A row for each algorithm and split."""

    rows: tuple[Row, ...]
    """By algorithm, then split."""
    left_out: tuple[tuple[str, str], ...]
    """Algorithms that cannot do what is asked, each with the reason."""


def score_table(
    loads: Loads,
    *,
    ranks: int,
    algorithms: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    objective: str | Path | Objective = "tokens",
    batches: int = 8,
    seed: int = 0,
    progress: Progress = silent,
    rank_speed: Sequence[float] | None = None,
    pairs: Pairs | None = None,
    **asked: Any,
) -> ScoreTable:
    """Plans with every algorithm, and scores each placement under every split.

    Args:
        loads: recorded windows; drift needs two or more.
        ranks: R.
        algorithms: names for the rows, in order; unless given, all known ones, FOR_LEVEL and UNPLANNED; with pairs
            FOR_VISITS too.
        splits: of `replica_split.SPLITS`; unless given, those that differ on so many nodes.
        objective: what is balanced, see `objectives.parse_objective`.
        batches: noisy batches to draw for each layer.
        seed: of the planners and of the noisy batches.
        progress: called with (layers done, layers in all), summed over the algorithms.
        rank_speed: how fast the ranks are: all rows are judged by them, and planned for them.
        pairs: which experts are chosen together: tells what tokens visit.
        asked: `slots`, `rank_slots`, `budget`, `node_size` and `search_ms`, as `plan` takes them.

    Raises:
        ConfigError: the loads are all zero; pairs of another model; or an algorithm that was named cannot do what is
            asked. Without names, such ones are left out, unless none is left.
    """
    goal = parse_objective(objective)
    if not loads.loaded_layers:
        raise ConfigError("loads: no expert has had a token: there is nothing to compare; record a real run")
    if pairs is not None:
        check_pairs_of(pairs, loads.layers, loads.experts, "loads", loads.numbering)
    # Imported late: this brings numba. Else the first algorithm's seconds would be those of the compiler.
    from epbackend.placement.warmup import warm_up, warm_up_affinity

    warm_up()
    if pairs is not None:
        warm_up_affinity()
    asked |= {"ranks": ranks, "objective": goal, "seed": seed, "rank_speed": rank_speed}
    default, *others = planner_names()
    variants = (FOR_LEVEL,) if pairs is None else (FOR_LEVEL, FOR_VISITS)
    chosen = algorithms if algorithms is not None else (UNPLANNED, default, *variants, *others)
    noises = [
        draw_batches(loads, loads.loaded_layers, batches=batches, concentration=concentration, seed=seed)
        for concentration in (None, CONCENTRATION)
    ]
    if splits is None:
        several = asked.get("node_size", 0) not in (0, ranks)
        splits = SPLITS if several else [split for split in SPLITS if split != LEVEL_BY_NODE]
    rows: list[Row] = []
    left_out: list[tuple[str, str]] = []
    total = len(chosen) * loads.layers
    for index, algorithm in enumerate(chosen):
        try:
            rows += _rows(algorithm, loads, splits, goal, noises, pairs, asked)
        except ConfigError as error:
            if algorithms is not None:
                raise
            left_out.append((algorithm, str(error)))
        progress((index + 1) * loads.layers, total)
    if not rows:
        raise ConfigError(left_out[0][1])
    return ScoreTable(tuple(rows), tuple(left_out))


def mean_imbalance(
    placement: Placement,
    layers: Sequence[int],
    counts_YBE: np.ndarray,
    split: str,
    objective: Objective = TOKENS,
    rank_speed: tuple[float, ...] = (),
) -> float:
    """The mean over layers and batches, under a split, of counts as `draw_batches` draws them for these layers."""
    layouts = [placement.layers[layer] for layer in layers]
    shares_YBP = (
        expected_shares(split, counts_BE, layout, placement.node_size, rank_speed)
        for counts_BE, layout in zip(counts_YBE, layouts, strict=True)
    )
    each = zip(shares_YBP, layouts, strict=True)
    return float(np.mean([imbalances(s, lay, objective, rank_speed) for s, lay in each]))


def _rows(
    algorithm: str,
    loads: Loads,
    splits: Sequence[str],
    objective: Objective,
    noises: list[np.ndarray],
    pairs: Pairs | None,
    asked: dict[str, Any],
) -> list[Row]:
    """A row for each split."""
    started = time.perf_counter()
    placement = _place(algorithm, loads, pairs, asked)
    seconds = time.perf_counter() - started
    drift = _drift(algorithm, loads, splits, objective, pairs, asked)
    visits = {} if pairs is None else {"nearest": placement_visits(placement, pairs)}
    rows = []
    for split in splits:
        own = score(placement, loads, split=split, objective=objective, rank_speed=asked["rank_speed"])
        speeds = checked_speeds(asked["rank_speed"], placement.ranks)
        noise = [mean_imbalance(placement, loads.loaded_layers, n, split, objective, speeds) for n in noises]
        judged = replace(own, algorithm=algorithm)
        rows.append(Row(judged, seconds, noise[0], noise[1], drift.get(split), visits.get(split)))
    return rows


def _drift(
    algorithm: str,
    loads: Loads,
    splits: Sequence[str],
    objective: Objective,
    pairs: Pairs | None,
    asked: dict[str, Any],
) -> dict[str, float]:
    """The drift by split; empty with a single window."""
    if loads.windows == 1:
        return {}
    first = Loads(loads.tokens_WYE[:1], loads.names[:1])
    later = Loads(loads.tokens_WYE[1:], loads.names[1:])
    placement = _place(algorithm, first, pairs, asked)
    return {
        split: score(
            placement, later, split=split, objective=objective, rank_speed=asked["rank_speed"]
        ).imbalance_mean
        for split in splits
    }


def _place(algorithm: str, loads: Loads, pairs: Pairs | None, asked: dict[str, Any]) -> Placement:
    """The placement of a row: by `plan`, or in order."""
    if algorithm in WITHOUT_SEARCH:
        asked = {**asked, "search_ms": 0.0}
    if algorithm == FOR_LEVEL:
        return plan(loads, algorithm="refined", split="level", **asked)
    if algorithm == FOR_VISITS and pairs is not None:
        return plan(loads, algorithm="refined", affinity=Affinity(pairs), **asked)
    if algorithm != UNPLANNED:
        return plan(loads, algorithm=algorithm, **asked)
    if rank_slots := asked.get("rank_slots"):
        layer = Layout.in_order(loads.experts, rank_slots)
    else:
        layer = Layout.even(loads.experts, asked["ranks"], asked.get("slots"))
    return Placement((layer,) * loads.layers, asked.get("node_size", 0), Provenance(UNPLANNED))
