"""The oracles of the levelling splits: SciPy's HiGHS, on the linear program that LPLB states and on one more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from epbackend.placement.placement import Layout


def optimum(tokens_E: np.ndarray, layout: Layout, rank_speed: Sequence[float] = ()) -> float:
    """The least largest rank time of any split into real numbers; without speeds, of loads.

    Variables: the slots' shares, and the maximum.
    """
    speed_R = np.array(rank_speed) if rank_speed else np.ones(layout.ranks)
    slots, last = np.arange(layout.slots), layout.slots
    columns = np.concatenate([slots, np.full(layout.ranks, last)])
    rows = np.concatenate([layout.rank_of_slot_P, np.arange(layout.ranks)])
    below_RV = coo_array((np.where(columns == last, -speed_R[rows], 1.0), (rows, columns)))
    whole_EV = coo_array((np.ones(last), (layout.slot_to_expert_P, slots)), shape=(layout.experts, last + 1))
    cost_V = np.where(np.arange(last + 1) == last, 1.0, 0.0)
    found = linprog(
        cost_V, below_RV.tocsr(), np.zeros(layout.ranks), whole_EV.tocsr(), tokens_E, method="highs"
    )
    return float(found.fun)


def least_crossing(counts_ME: np.ndarray, layout: Layout, node_size: int, most: float) -> float:
    """The fewest tokens that cross nodes, where no rank gets more than `most`, of any split into real numbers.

    Variables: the slots' shares, and for each expert and node that has it how many of its tokens stay there.
    """
    node_P = layout.rank_of_slot_P // node_size
    stays = sorted(set(zip(node_P.tolist(), layout.slot_to_expert_P.tolist(), strict=True)))
    of_pair = {pair: index for index, pair in enumerate(stays)}
    slots = np.arange(layout.slots)
    pair_P = np.array(
        [of_pair[pair] for pair in zip(node_P.tolist(), layout.slot_to_expert_P.tolist(), strict=True)]
    )
    rows = np.concatenate(
        [layout.rank_of_slot_P, layout.ranks + pair_P, layout.ranks + np.arange(len(stays))]
    )
    columns = np.concatenate([slots, slots, layout.slots + np.arange(len(stays))])
    values = np.repeat([1.0, -1.0, 1.0], [layout.slots, layout.slots, len(stays)])
    whole_EV = coo_array(
        (np.ones(layout.slots), (layout.slot_to_expert_P, slots)),
        shape=(layout.experts, layout.slots + len(stays)),
    )
    found = linprog(
        -np.repeat([0.0, 1.0], [layout.slots, len(stays)]),
        coo_array((values, (rows, columns))).tocsr(),
        np.repeat([most, 0.0], [layout.ranks, len(stays)]),
        whole_EV.tocsr(),
        counts_ME.sum(axis=0),
        bounds=[*[(0, None)] * layout.slots, *((0, counts_ME[pair]) for pair in stays)],
        method="highs",
    )
    return float(counts_ME.sum() + found.fun)
