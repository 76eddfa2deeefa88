"""Compiles the planners and splits beforehand: `python -m epbackend.placement.warmup`, which `make setup` calls.

A module of its own because it stands above the planners: it calls them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from epbackend.placement.affinity import Affinity
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS
from epbackend.placement.pairs import Pairs
from epbackend.placement.placement import Placement
from epbackend.placement.planners import plan
from epbackend.placement.planners.base import Task
from epbackend.placement.planners.incremental import plan_layers as incremental
from epbackend.placement.planners.refined import plan_layers as refined
from epbackend.placement.replica_split import level_shares, own_quota


def warm_up(say: Callable[[str], None] = lambda text: None) -> None:
    """Compiles what the planners and splits usually need, and keeps it on disk, so that no first call has to wait."""
    say("compiling the planner and the splits")
    loads = Loads.of(np.array([[5.0, 2.0, 1.0, 1.0]]))
    refined(Task(loads, ranks=2, slots=4, objective=TOKENS, budget=2, options={"split": "level"}))
    current = Placement.even(layers=1, experts=4, ranks=2, slots=6)
    incremental(Task(loads, ranks=2, slots=6, objective=TOKENS, current=current, options={"target": 1}))
    layout, counts_RE = current.layers[0], np.ones((2, 4), np.int64)
    own_quota(counts_RE, level_shares(counts_RE.sum(axis=0), layout), layout, source_rank=0)


def warm_up_affinity() -> None:
    """The same for plans with `affinity` and for estimates of visits, which most plans do without."""
    pairs = Pairs.of_routes([np.array([[0, 1], [2, 3], [0, 1], [0, 2]])], 4)
    asked = {"ranks": 4, "slots": 8, "node_size": 2}
    plan(Loads.of(pairs.loads_YE), **asked, affinity=Affinity(pairs))  # type: ignore[arg-type]


if __name__ == "__main__":
    warm_up(print)
    warm_up_affinity()
