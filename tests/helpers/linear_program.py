"""The oracle of the levelling split: SciPy's HiGHS on the linear program that LPLB states."""

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
