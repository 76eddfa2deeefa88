"""Where the experts of a model live: planners, the split of tokens over replicas, scores, and the files of all of them.

    from epbackend.placement import plan, read_loads

    loads = read_loads("recorded.json")
    placement = plan(loads, ranks=32, slots=288)
    print(placement.to_json())

Needs NumPy, and numba for what is compiled; no torch and no device. Where to look:

- `placement` (a layout for each layer) and `loads` (what it is planned on), `formats` (the files of both), `synthetic`;
- `planners` (`plan`), with `budget` and the compiled `search`; `objectives`: what they balance;
- `pairs`, `visits`, `affinity`: which experts are chosen together, what that makes tokens visit, plans for less of it;
- `replica_split`: which replica a token takes, batch by batch; `score` and `compare`: how good a placement is.

Letters in names of arrays, as in the whole project:

- Y layers of the model, W windows of recorded loads, E logical experts, C replicas of an expert;
- P slots of a layer over all ranks, counted densely (the data path pads its slot ids to R * L), R ranks, L slots of one
  rank, M nodes;
- T tokens of one source, K experts per token, S choices, flat: one for each (token, k);
- B batches, or problems solved at once; Q features of a rank's cost;
- X points of a curve or table (numbers of tokens, numbers of slots), A numbers of active experts in a time table.

Letters of a single module are explained there.
"""

from importlib import import_module
from typing import Any

# Loaded on first use: reading a placement needs no planner, and a plan by EPLB no compiled code.
_HOME = {
    "Affinity": "affinity",
    "Layout": "placement",
    "Loads": "loads",
    "Pairs": "pairs",
    "Placement": "placement",
    "Provenance": "placement",
    "assign": "replica_split",
    "count_moves": "score",
    "nearest_quota": "replica_split",
    "plan": "planners",
    "planner_names": "planners",
    "read_loads": "formats",
    "synthetic_loads": "synthetic",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'epbackend.placement' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
