"""How fast ranks are, told from the steps that they make: what calls of experts were given, and how long they took.

A rank with much to do takes as long as a slow one. So all calls of all ranks are explained together, by a cost of a
call, of a row and of an active expert that ranks have in common, and by a speed that each has of its own.

Speeds that are in use stay until measured ones have left them by a margin, in most of the last windows: what noise
does, or one bad window, moves no expert. A rank counts as fast again once it is within half of the margin of the
fastest.
"""

from __future__ import annotations

from collections import deque
from itertools import combinations

import numpy as np

from epbackend.placement.speeds import checked_speeds

WINDOWS = 3
"""Of which the median counts."""
ROUNDS = 20
SLOWEST = 0.05
"""Of the fastest rank's speed: what seems slower counts as this, and gets little more than it has to hold."""


class SpeedWatch:
    """The speeds that are in use, and what was measured last."""

    def __init__(self, work_R44: np.ndarray, margin: float, rank_speed: tuple[float, ...] = ()) -> None:
        """`work_R44`: each rank's `ExpertWork` so far; `rank_speed`: in use now, as `checked_speeds` gives them."""
        self._last_R44, self._margin = work_R44, margin
        self._measured: deque[np.ndarray] = deque(maxlen=WINDOWS)
        self.rank_speed = rank_speed

    def observe(self, work_R44: np.ndarray) -> bool:
        """A window has ended: each rank's `ExpertWork` so far. Whether other speeds are in use from now on."""
        window_R44, self._last_R44 = work_R44 - self._last_R44, work_R44
        measured_R = relative_speeds(window_R44)
        if measured_R is None:
            return False
        self._measured.append(measured_R)
        if len(self._measured) < WINDOWS:
            return False
        speed_R = np.median(self._measured, axis=0)
        speed_R = np.maximum(speed_R / speed_R.max(), SLOWEST)
        fast_R = speed_R >= 1 - self._margin / 2  # as the fastest, as far as can be told
        in_use_R = np.array(self.rank_speed or (1.0,) * len(speed_R))
        change_R = speed_R / in_use_R
        if change_R.min() >= change_R.max() * (1 - self._margin) and (in_use_R[fast_R] == 1).all():
            return False
        speed_R[fast_R] = 1.0
        self.rank_speed = checked_speeds(speed_R.round(3).tolist(), len(speed_R))
        return True


def relative_speeds(work_R44: np.ndarray) -> np.ndarray | None:
    """Speeds of ranks, float64 [R], their geometric mean 1; None where a rank has had no row.

    Args:
        work_R44: the sums of products of each rank's calls in the window, see `ExpertWork`.
    """
    calls_R, seconds_R = work_R44[:, 0, 0], work_R44[:, 0, 3]
    if (calls_R <= 0).any() or (seconds_R <= 0).any():
        return None
    speed_R = np.ones(len(work_R44))
    for _ in range(ROUNDS):
        # A call of a rank that is half as fast says what it would take by half of its seconds.
        common_44 = work_R44.copy()
        common_44[:, :3, 3] *= speed_R[:, None]
        cost_3 = _least_squares(common_44.sum(axis=0))
        speed_R = work_R44[:, 0, :3] @ cost_3 / seconds_R
        speed_R /= np.exp(np.log(speed_R).mean())
    return speed_R


def _least_squares(work_44: np.ndarray) -> np.ndarray:
    """Seconds of a call, a row and an active expert, [3], none below 0, that explain these calls best."""
    scale_3 = np.sqrt(work_44.diagonal()[:3])
    scale_3[scale_3 == 0] = 1.0
    features_33 = work_44[:3, :3] / np.outer(scale_3, scale_3)
    seconds_3 = work_44[:3, 3] / scale_3
    best_3, best = np.zeros(3), np.inf
    # With three of them, trying which are 0 is the exact way. The call alone always explains something.
    for kept in (list(each) for count in (1, 2, 3) for each in combinations(range(3), count)):
        cost_3 = np.zeros(3)
        cost_3[kept] = np.linalg.lstsq(features_33[np.ix_(kept, kept)], seconds_3[kept], rcond=1e-9)[0]
        error = cost_3 @ features_33 @ cost_3 - 2 * cost_3 @ seconds_3
        if (cost_3 >= 0).all() and error < best:
            best_3, best = cost_3, error
    return best_3 / scale_3
