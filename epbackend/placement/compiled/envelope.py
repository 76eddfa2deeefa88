"""The convex envelope of a falling curve."""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.jit import entry


@entry
def falls(curve_X):
    """How far the lower convex envelope of the curve falls at each of its X - 1 steps; never more than a step before.

    Andrew's monotone chain (1979), on points that come in order.
    """
    corner_X = np.empty(curve_X.size, np.int64)
    corners = 0
    for x in range(curve_X.size):
        while corners >= 2:
            a, b = corner_X[corners - 2], corner_X[corners - 1]
            if (curve_X[a] - curve_X[b]) * (x - b) > (curve_X[b] - curve_X[x]) * (b - a):
                break
            corners -= 1
        corner_X[corners] = x
        corners += 1
    fall_X = np.empty(curve_X.size - 1)
    for corner in range(corners - 1):
        a, b = corner_X[corner], corner_X[corner + 1]
        for x in range(a, b):
            fall_X[x] = (curve_X[a] - curve_X[b]) / (b - a)
    return fall_X
