"""Time in which a process ran, for whoever watches over others. Without torch, which a server's guard does not load."""

from __future__ import annotations

import time
from collections import deque

LOOK_MOST_S = 2.0
"""From one look to the next where a thread is not paused; what is more counts as a pause."""
PAUSES = 64
"""So many are remembered: older than the longest timeout, or too short to matter."""


class RunningTime:
    """How old something is, by the time in which this process ran.

    Ctrl-Z in a terminal and a container that is frozen stop the ranks together with those who watch over them: nobody
    stalled meanwhile, and all go on together.
    """

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._pauses: deque[tuple[float, float]] = deque(maxlen=PAUSES)

    def look(self) -> float:
        """The time now; to be called by the watching thread at each of its looks."""
        now = time.monotonic()
        if (paused := now - self._looked - LOOK_MOST_S) > 0:
            self._pauses.append((now, paused))
        self._looked = now
        return now

    def age_s(self, since: float) -> float:
        """Seconds from `since` to the last look, without pauses."""
        paused = sum(min(length, end - since) for end, length in self._pauses if end > since)
        return max(0.0, self._looked - since - paused)
