"""Options that are numbers: checked once, and plain Python numbers afterwards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from epbackend.errors import ConfigError


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int. Raises ConfigError, with the name, for what is no whole number, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ConfigError(f"{name}: must be a whole number of {least} or more, not {value!r}")
    return int(value)


def real_number(name: str, value: Any, below: float = math.inf) -> float:
    """`value` as a float. Raises ConfigError, with the name, for what is no number of 0 or more and below `below`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < below:
        above = f"from 0 to below {below:g}" if below < math.inf else "of 0 or more, and finite"
        raise ConfigError(f"{name}: must be a number {above}, not {value!r}")
    return float(value)
