"""What no placement can beat."""

from __future__ import annotations

import numpy as np

from epbackend.placement.replicas import optimal_copies


def lower_bound(weight_E: np.ndarray, slots: int, ranks: int) -> float:
    """Least possible load of the busiest rank, in the unit of the weights, where copies share their expert evenly.

    The larger of the mean rank load and T, the lightest that the heaviest copy can be with so many slots.
    """
    weight_E = np.asarray(weight_E, dtype=np.float64)
    copies_E = optimal_copies(weight_E, slots)
    return float(max(weight_E.sum() / ranks, (weight_E / copies_E).max()))
