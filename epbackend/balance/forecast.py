"""What the next window of loads will look like, from the windows so far; of each layer by what has predicted it best.

Three ways to predict the shares of a layer's experts: the last window again; the exponential average of all so far;
their trend, by Holt's linear method (1957). Each window is first predicted by all three, and then judges them, by the
total variation distance. A layer keeps to its last window as long as neither of the others was clearly nearer to what
came. So noise is averaged out while the load is steady, and a load that jumps is followed at once.

Letters: Z ways to predict, B windows to judge by.
"""

from __future__ import annotations

from collections import deque

import numpy as np

WAYS = ("last", "average", "trend")

SMOOTHING = 0.3
"""Weight of the newest window in the average, in the trend, and in what is remembered of each way's errors."""

CLEARLY = 0.95
"""Another way is taken where its error is below this part of the last window's."""

LEAST_WINDOWS = 4
"""Windows of a layer that must have come before another way than the last window is trusted."""

MEMORY = 8
"""Windows that are kept to judge a placement by."""


class Forecast:
    """Fed with windows, one after the other. A layer without a token in a window has not had that window.

    `shares_YE`, float64: the part of each layer's tokens that is expected to go to each expert in the coming window;
    zeros for a layer that never had a token. `way_Y`, int64: which of `WAYS` says so.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.way_Y = np.zeros(layers, np.int64)
        self.shares_YE = np.zeros((layers, experts))
        self._windows_Y = np.zeros(layers, np.int64)
        self._recent: deque[np.ndarray] = deque(maxlen=MEMORY)
        self._average_YE, self._level_YE, self._slope_YE = np.zeros((3, layers, experts))
        self._predicted_ZYE = np.zeros((len(WAYS), layers, experts))
        self._error_ZY = np.zeros((len(WAYS), layers))

    def observe(self, tokens_YE: np.ndarray) -> None:
        """One more window, float64 [Y, E], finite and 0 or more."""
        came_Y = tokens_YE.sum(axis=1) > 0
        share_YE = _shares(tokens_YE)
        self._recent.append(share_YE)

        judged_Y = came_Y & (self._windows_Y > 0)
        weight_Y = np.where(self._windows_Y > 1, SMOOTHING, 1.0) * judged_Y
        distance_ZY = np.abs(self._predicted_ZYE - share_YE).sum(axis=2) / 2
        self._error_ZY += weight_Y * (distance_ZY - self._error_ZY)

        weight_Y1 = (np.where(self._windows_Y > 0, SMOOTHING, 1.0) * came_Y)[:, None]
        self._average_YE += weight_Y1 * (share_YE - self._average_YE)
        weight_Y1 = (np.where(self._windows_Y > 1, SMOOTHING, 1.0) * came_Y)[
            :, None
        ]  # two windows make a trend
        rise_YE = (1 - weight_Y1) * self._slope_YE + weight_Y1 * (share_YE - self._level_YE)
        self._level_YE += came_Y[:, None] * rise_YE
        self._slope_YE += weight_Y1 * judged_Y[:, None] * (rise_YE - self._slope_YE)

        self._windows_Y += came_Y
        last_YE = np.where(came_Y[:, None], share_YE, self._predicted_ZYE[0])
        trend_YE = _shares(np.maximum(self._level_YE + self._slope_YE, 0.0))
        self._predicted_ZYE = np.stack([last_YE, self._average_YE, trend_YE])
        clear_Y = self._error_ZY.min(axis=0) < CLEARLY * self._error_ZY[0]
        trusted_Y = clear_Y & (self._windows_Y >= LEAST_WINDOWS)
        self.way_Y = np.where(trusted_Y, self._error_ZY.argmin(axis=0), 0)
        self.shares_YE = np.take_along_axis(self._predicted_ZYE, self.way_Y[None, :, None], axis=0)[0]

    def judges(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """What to judge a placement of the layer by: shares_BE of windows, and weight_B, which sum to 1.

        What is predicted; but where the average predicts best, the recent windows one by one: a placement that fits the
        noise of a single window is then found to gain nothing. The layer must have had a token.
        """
        windows = [share_YE[layer] for share_YE in reversed(self._recent) if share_YE[layer].any()]
        if not windows or WAYS[self.way_Y[layer]] != "average":
            return self.shares_YE[layer][None], np.ones(1)
        shares_BE = np.array(windows)
        weight_B = (1 - SMOOTHING) ** np.arange(len(shares_BE))
        return shares_BE, weight_B / weight_B.sum()


def _shares(values_YE: np.ndarray) -> np.ndarray:
    """Of the sum of each row; zeros where that is zero."""
    total_Y1 = values_YE.sum(axis=1, keepdims=True)
    return values_YE / np.where(total_Y1 > 0, total_Y1, 1.0)
