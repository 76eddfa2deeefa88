"""The loads of an engine that serves, as files that placements are planned on.

A balancer's windows become those of one file, which `epbackend plan`, `compare` and `simulate` take as a sequence.
However long the engine serves, there are at most MOST_WINDOWS of them: when there would be more, each is added to its
neighbour, and from then on a window of the file is twice as long. So all of a file are of like length (the last one may
be shorter), as planners take them for equals.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from epbackend.errors import EPError
from epbackend.files import check_target, replace_file
from epbackend.names import BOTH, PHASES
from epbackend.placement.formats.sglang import loads_bytes
from epbackend.placement.loads import Loads

MOST_WINDOWS = 32
EVERY_S = 30.0
"""How often a file is brought up to date."""
SETTING = "balance.record"
"""Of the configuration, where the name of a file comes from."""
BY_PHASE = "{phase}"
"""In the name of a file: one for each of PHASES."""

logger = logging.getLogger("epbackend")


def of_phases(tokens_2X: np.ndarray, phases: str) -> np.ndarray:
    """The part of one of PHASES, or of BOTH together: an array without the first axis."""
    return tokens_2X.sum(axis=0) if phases == BOTH else tokens_2X[PHASES.index(phases)]


class WindowsFile:
    """What the windows of one engine held. A file that cannot be written is a warning, and is tried again."""

    def __init__(self, path: str, phases: str, numbering: str | None = None) -> None:
        """Counts from zero.

        Args:
            path: of the file; with BY_PHASE in it, of one for each phase.
            phases: whose loads a single file holds: one of PHASES, or BOTH.
            numbering: by whose numbers experts are counted.

        Raises:
            ConfigError: nothing could be written there.
        """
        self._files = {Path(path): phases}
        if BY_PHASE in path:
            self._files = {Path(path.replace(BY_PHASE, phase)): phase for phase in PHASES}
        for file in self._files:
            check_target(SETTING, file)
        self._numbering = numbering
        self._windows: list[np.ndarray] = []
        """Tokens of each, [2, Y, E]; the last one may still grow."""
        self._names: list[str] = []
        self._span, self._in_last = 1, 1
        """Windows of the balancer in one of the file, and in its last one."""
        self._counted: np.ndarray | int = 0
        self._due, self._failed, self._began = time.monotonic() + EVERY_S, False, _now()

    def add(self, counted_2YE: np.ndarray) -> None:
        """A window has ended; these are the tokens of each phase, layer and expert from the engine's start on."""
        window_2YE, self._counted = counted_2YE - self._counted, counted_2YE
        if (window_2YE < 0).any():
            window_2YE = counted_2YE  # of a model that was built again, and counts from zero
        if not window_2YE.any():
            return
        if self._windows and self._in_last < self._span:
            self._windows[-1] = self._windows[-1] + window_2YE
            self._in_last += 1
        else:
            if len(self._windows) == MOST_WINDOWS:
                pairs = zip(self._windows[::2], self._windows[1::2], strict=True)
                self._windows, self._names = [first + second for first, second in pairs], self._names[::2]
                self._span *= 2
            self._windows.append(window_2YE)
            self._names.append(self._began)
            self._in_last = 1
        self._began = _now()
        if time.monotonic() > self._due:
            self.save()

    def save(self) -> None:
        """Bring the files up to date; a phase without any token has none."""
        self._due = time.monotonic() + EVERY_S
        try:
            for path, phases in self._files.items():
                windows = [of_phases(window_2YE, phases) for window_2YE in self._windows]
                found = [
                    (tokens, name) for tokens, name in zip(windows, self._names, strict=True) if tokens.any()
                ]
                if found:
                    tokens, names = zip(*found, strict=True)
                    replace_file(path, loads_bytes(Loads.of(tokens, names, self._numbering)))
            self._failed = False
        except EPError as error:
            if not self._failed:
                logger.warning("%s: %s; serving goes on, and it is tried again", SETTING, error)
            self._failed = True


def _now() -> str:
    return time.strftime("from %Y-%m-%d %H:%M:%S")
