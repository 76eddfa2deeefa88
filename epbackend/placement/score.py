"""How good a placement is on given loads under a given split, beside what no placement can beat; and what it takes to
get there from another placement: the experts that each rank does not hold yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS, Objective, parse_objective
from epbackend.placement.placement import Layout, Placement
from epbackend.placement.replica_split import expected_shares
from epbackend.placement.speeds import checked_speeds


@dataclass(frozen=True)
class Score:
    """Imbalance is the largest rank cost over the mean one, of one layer in one window of loads; 1 is perfect.

    Where ranks differ in speed, costs are over speeds, and the mean is what all would cost if they ended together.
    """

    algorithm: str
    """The algorithm that made the placement."""
    split: str
    objective: str
    ranks: int
    slots: int | None
    """P of each layer; None where layers differ."""
    layers: int
    """The number of layers scored: those that have loads."""
    imbalance_mean: float
    """Over layers and windows."""
    imbalance_worst: float
    worst_layer: int
    lower_bound_mean: float
    """No placement with these slots gets below it under any split; 1 for objectives other than tokens."""
    largest_replica: float
    """Tokens of the busiest slot over the mean rank load of its layer; above 1 it alone overloads its rank."""
    duplicates_on_rank: int
    """Slots whose expert has another slot on the same rank."""
    moves: int | None = None
    """Experts that ranks must receive, starting from the baseline; None without one."""
    moves_share: float | None = None
    """`moves` over the slots."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def score(
    placement: Placement,
    loads: Loads | np.ndarray,
    *,
    split: str = "even",
    objective: str | Path | Objective = "tokens",
    baseline: Placement | None = None,
    rank_speed: Sequence[float] | None = None,
) -> Score:
    """Scores every layer that has loads, in every window.

    Args:
        placement: what is scored.
        loads: recorded windows, or one [Y, E] array of choices.
        split: how replicas share the tokens of their expert, one of `replica_split.SPLITS`.
        objective: what is balanced, see `objectives.parse_objective`.
        baseline: the placement in use, from which moves are counted.
        rank_speed: how fast the ranks are, in any unit; unless given, those that the placement was planned for.

    Raises:
        ConfigError: loads or a baseline of another model, loads without a token, or an unknown split.
    """
    loads = loads if isinstance(loads, Loads) else Loads.of(loads)
    check_loads_of(placement, loads)
    goal = parse_objective(objective)
    speeds = placement.rank_speed if rank_speed is None else checked_speeds(rank_speed, placement.ranks)
    scored: list[tuple[float, float, float, int]] = []  # (imbalance, bound, largest replica, layer)
    for layer in loads.loaded_layers:
        layout = placement.layers[layer]
        tokens_WE = loads.windows_of(layer)
        shares_WP = expected_shares(split, tokens_WE, layout, placement.node_size, speeds)
        for tokens_E, shares_P, worst in zip(
            tokens_WE, shares_WP, imbalances(shares_WP, layout, goal, speeds), strict=True
        ):
            mean = tokens_E.sum() / (sum(speeds) or layout.ranks)
            possible = lower_bound(tokens_E, layout.slots, layout.ranks, speeds)
            least = possible / mean if goal == TOKENS else 1.0
            scored.append((worst, least, shares_P.max() / mean, layer))
    imbalance, bound, largest, of_layer = (np.array(values) for values in zip(*scored, strict=True))
    moves = count_moves(baseline, placement, loads.loaded_layers) if baseline else None
    return Score(
        algorithm=placement.provenance.algorithm,
        split=split,
        objective=goal.name,
        ranks=placement.ranks,
        slots=placement.slots,
        layers=len(loads.loaded_layers),
        imbalance_mean=float(imbalance.mean()),
        imbalance_worst=float(imbalance.max()),
        worst_layer=int(of_layer[imbalance.argmax()]),
        lower_bound_mean=float(bound.mean()),
        largest_replica=float(largest.max()),
        duplicates_on_rank=placement.duplicates_on_rank,
        moves=moves.total if moves else None,
        moves_share=moves.share if moves else None,
    )


def imbalances(
    shares_BP: np.ndarray,
    layout: Layout,
    objective: Objective = TOKENS,
    rank_speed: tuple[float, ...] = (),
) -> np.ndarray:
    """Largest rank cost over the mean, float64 [B], for the tokens that each slot gets in each of B batches."""
    return ratios(shares_BP, layout, objective, rank_speed).max(axis=1)


def ratios(
    shares_BP: np.ndarray,
    layout: Layout,
    objective: Objective = TOKENS,
    rank_speed: tuple[float, ...] = (),
) -> np.ndarray:
    """Rank costs over the mean, float64 [B, R]; with speeds the mean is what all would take if they ended together."""
    costs_BR = rank_costs(shares_BP, layout, objective, rank_speed)
    if not rank_speed:
        return costs_BR / costs_BR.mean(axis=1, keepdims=True)
    return costs_BR / (costs_BR @ np.array(rank_speed) / sum(rank_speed))[:, None]


def rank_costs(
    shares_BP: np.ndarray,
    layout: Layout,
    objective: Objective = TOKENS,
    rank_speed: tuple[float, ...] = (),
) -> np.ndarray:
    """The cost of each rank, float64 [B, R]: its tokens in the unit of the shares, or the objective's cost of them.

    Over its speed, where speeds are given.
    """
    if objective == TOKENS:
        costs_BR = np.add.reduceat(shares_BP, layout.first_R[:-1], axis=1)
    else:
        costs_BR = np.stack(
            [objective.rank_costs(s_P, layout.rank_of_slot_P, layout.ranks) for s_P in shares_BP]
        )
    return costs_BR / rank_speed if rank_speed else costs_BR


@dataclass(frozen=True)
class Terms:
    """What a placement is judged by."""

    split: str = "even"
    objective: Objective = TOKENS

    @classmethod
    def of(cls, placement: Placement) -> Terms:
        """Those that it was planned for, by its provenance; tokens, where that names a file of measured times."""
        asked = dict(placement.provenance.options)
        split = "nearest" if "affinity" in asked else asked.get("split", "even")
        objective = str(asked.get("objective", TOKENS.name))
        return cls(split, TOKENS if objective.endswith(".json") else parse_objective(objective))

    def in_words(self, placement: Placement) -> str:
        """The head of a table of imbalances under it, for people."""
        unit = "load" if self.objective == TOKENS else self.objective.name
        what = "time of the slowest" if placement.rank_speed else f"{unit} of the busiest"
        return f"{what} rank, over the mean" + f", split {self.split}" * (self.split != "even")

    def ratios_YWR(self, placement: Placement, loads: Loads) -> list[np.ndarray]:
        """For each of the Y layers with loads, [W, R]: the cost of each rank over the mean in each window."""
        speeds, found = placement.rank_speed, []
        for index in loads.loaded_layers:
            layer, tokens_WE = placement.layers[index], loads.windows_of(index)
            shares_WP = expected_shares(self.split, tokens_WE, layer, placement.node_size, speeds)
            found.append(ratios(shares_WP, layer, self.objective, speeds))
        return found


def mean_busiest_Y(ratios_YWR: list[np.ndarray]) -> np.ndarray:
    """The busiest rank of each layer over the mean, float64 [Y]: each window has its own, and they count alike."""
    return np.array([each_WR.max(axis=1).mean() for each_WR in ratios_YWR])


def check_loads_of(placement: Placement, loads: Loads) -> None:
    """Raises ConfigError if placement and loads are not of the same model, or no layer has loads."""
    for name, of_loads, of_placement in (
        ("layers", loads.layers, len(placement.layers)),
        ("experts", loads.experts, placement.experts),
    ):
        if of_loads != of_placement:
            raise ConfigError(
                f"loads: have {of_loads} {name}, but the placement has {of_placement}; use loads of the same model"
            )
    planned = placement.numbering
    if planned and loads.numbering and planned != loads.numbering:
        raise ConfigError(
            f"loads: they count experts by the numbers of {loads.numbering}, but the placement by those of {planned}; "
            "use loads of the same checkpoint"
        )
    if not loads.loaded_layers:
        raise ConfigError("loads: no layer has a token; record some before judging a placement by them")


# What no placement can beat


def lower_bound(weight_E: np.ndarray, slots: int, ranks: int, rank_speed: tuple[float, ...] = ()) -> float:
    """Least possible load of the busiest rank, in the unit of the weights, if replicas share their expert evenly.

    The larger of the mean rank load, and the least weight that the heaviest replica can have with so many slots. With
    speeds it is a time: that of all ranks if they end together, or of the heaviest replica on the fastest rank.
    """
    # Imported late: this brings numba.
    from epbackend.placement.search.layer_search import optimal_replicas

    weight_E = np.asarray(weight_E, dtype=np.float64)
    replicas_E = optimal_replicas(weight_E, np.argsort(-weight_E, kind="stable"), slots, slots)
    return float(max(weight_E.sum() / (sum(rank_speed) or ranks), (weight_E / replicas_E).max()))


# Moves from one placement to another


@dataclass(frozen=True, eq=False)
class Moves:
    """Experts that ranks must receive. What a rank already holds, in any slot, costs nothing."""

    received_YR: np.ndarray
    """Experts that each rank receives in each of the compared layers, int64."""
    slots: int
    """Slots of those layers in the new placement."""

    @property
    def total(self) -> int:
        """Over all layers and ranks."""
        return int(self.received_YR.sum())

    @property
    def share(self) -> float:
        """Part of the slots that change, 0 to 1."""
        return self.total / self.slots if self.slots else 0.0


def count_moves(before: Placement, after: Placement, layers: Sequence[int] | None = None) -> Moves:
    """Compares the given layers, e.g. `loads.loaded_layers`; all of them unless given.

    Raises:
        ConfigError: the placements are of different models or numbers of ranks.
    """
    for name, old, new in (
        ("layers", len(before.layers), len(after.layers)),
        ("ranks", before.ranks, after.ranks),
        ("experts", before.experts, after.experts),
    ):
        if old != new:
            raise ConfigError(
                f"{name}: one placement has {old}, the other {new}; compare placements of one model and ranks"
            )
    chosen = range(len(after.layers)) if layers is None else layers
    received = [(after.layers[layer].held_RE & ~before.layers[layer].held_RE).sum(axis=1) for layer in chosen]
    received_YR = np.array(received, dtype=np.int64).reshape(len(chosen), after.ranks)
    return Moves(received_YR, sum(after.layers[layer].slots for layer in chosen))
