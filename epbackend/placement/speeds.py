"""How fast ranks are beside each other. What a rank makes the others wait for is its time: its load over its speed.

Speeds are parts of the fastest rank's, from 0 to 1, one for each rank. Where all ranks are equally fast the tuple is
empty, and plans and splits are those that know no speeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from epbackend.errors import ConfigError
from epbackend.files import read_json

RANK_SPEED = "rank_speed"
"""The option of a placement's provenance that holds the speeds it was planned for."""

FINEST = 4096
"""The weight of the fastest rank in whole-number arithmetic: a quarter of its speed is then exact to 0.05%."""


def checked_speeds(speeds: Sequence[float] | None, ranks: int) -> tuple[float, ...]:
    """Speeds in any unit, as parts of the fastest one; empty where they are equal, or none are given.

    Raises:
        ConfigError: another number than the ranks, or a speed that is none.
    """
    if speeds is None:
        return ()
    if not isinstance(speeds, (list, tuple)):
        raise ConfigError(f"rank_speed: must be a list of numbers, one for each rank, not {speeds!r:.80}")
    if not speeds:
        return ()
    if len(speeds) != ranks:
        raise ConfigError(
            f"rank_speed: {len(speeds)} speeds are given for {ranks} ranks; give one for each rank"
        )
    for rank, speed in enumerate(speeds):
        if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not 0 < speed < math.inf:
            raise ConfigError(
                f"rank_speed: that of rank {rank} is {speed!r}, and must be a number above 0; "
                "give 0.5 for a rank that is half as fast as one of 1"
            )
    fastest, slowest = max(speeds), min(speeds)
    if slowest * FINEST < fastest:
        raise ConfigError(
            f"rank_speed: rank {list(speeds).index(slowest)} has less than 1/{FINEST} of the fastest rank's speed; "
            "leave such a rank out"
        )
    return () if slowest == fastest else tuple(float(speed / fastest) for speed in speeds)


def parse_speeds(text: str) -> tuple[float, ...]:
    """Numbers between commas, or the path of a JSON file: a list, or an object that has one as "rank_speed".

    >>> parse_speeds("1,1,0.5")
    (1.0, 1.0, 0.5)

    Raises:
        ConfigError: the text is neither.
    """
    path = Path(text)
    if text.endswith(".json"):
        return tuple(_from_file(path))
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"rank_speed: {text!r} must be a number for each rank, as 1,1,0.5, or the path of a .json file with them"
        ) from None


def _from_file(path: Path) -> list[float]:
    data = read_json("rank_speed", path)
    speeds = data.get(RANK_SPEED) if isinstance(data, dict) else data
    if not isinstance(speeds, list) or any(type(speed) not in (int, float) for speed in speeds):
        raise ConfigError(
            f'rank_speed: {path} must be a list of numbers, or an object with one as "rank_speed", as '
            "epbackend calibrate writes it"
        )
    return speeds


@lru_cache(maxsize=64)
def rank_weights(rank_speed: tuple[float, ...], ranks: int) -> np.ndarray:
    """Speeds as whole numbers, int64 [R], read-only: 1 for each of equally fast ranks, `FINEST` at most.

    >>> rank_weights((1.0, 0.5), 2).tolist()
    [2, 1]
    """
    weight_R = np.ones(ranks, dtype=np.int64)
    if rank_speed:
        weight_R = np.maximum(np.rint(np.array(rank_speed) * FINEST).astype(np.int64), 1)
        weight_R //= np.gcd.reduce(weight_R)
    weight_R.flags.writeable = False
    return weight_R
