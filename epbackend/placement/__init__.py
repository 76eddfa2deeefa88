"""Where the experts of a model live: planners, the split of tokens over replicas, scores, and the files of all of them.

    from epbackend.placement import plan, read_loads

    loads = read_loads("recorded.json")
    placement = plan(loads, ranks=32, slots=288)
    print(placement.to_json())

Needs NumPy, and numba for what is compiled; no torch and no device.
"""

from importlib import import_module
from typing import Any

# Loaded on first use: reading a placement needs no planner, and an EPLB plan no compiled code.
_HOME = {
    "Layout": "placement",
    "Loads": "loads",
    "Moves": "score",
    "Objective": "objectives",
    "Placement": "placement",
    "Provenance": "placement",
    "Score": "score",
    "assign": "replica_split",
    "count_moves": "score",
    "even_shares": "replica_split",
    "level_shares": "replica_split",
    "nearest_quota": "replica_split",
    "own_quota": "replica_split",
    "parse_objective": "objectives",
    "plan": "planners",
    "planner_names": "planners",
    "read_loads": "formats",
    "read_placement": "formats",
    "score_table": "compare",
    "synthetic_loads": "synthetic",
}

__all__ = [
    "Layout",
    "Loads",
    "Moves",
    "Objective",
    "Placement",
    "Provenance",
    "Score",
    "assign",
    "count_moves",
    "even_shares",
    "level_shares",
    "nearest_quota",
    "own_quota",
    "parse_objective",
    "plan",
    "planner_names",
    "read_loads",
    "read_placement",
    "score_table",
    "synthetic_loads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epbackend.placement' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
