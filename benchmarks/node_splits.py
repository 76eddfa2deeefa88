"""What the splits leave on a token's node, and how they balance: `nearest`, `level`, `level_by_node`.

`python -m benchmarks.node_splits [ROUTES.npz ...]`: on synthetic topics; of files the array `topk_ids_TK` of one layer.
The plan is made with affinity on the first half, and the second half is split, batch by batch, in contiguous parts:
each rank's tokens are of neighbouring requests. It prints a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report import command_line, print_table
from epbackend.balance.cost import find_model
from epbackend.placement import Affinity, Loads, Pairs, plan
from epbackend.placement.placement import Layout
from epbackend.placement.replica_split import level_by_node_shares, level_shares, nearest_quota
from epbackend.placement.replica_split_reference import at_home
from epbackend.placement.score import imbalances
from epbackend.placement.synthetic import synthetic_routes

SHAPES = (("deepseek-v3", 16, 320, 4), ("deepseek-v3", 32, 384, 8), ("deepseek-v3", 64, 448, 8))
RECORDED = ((8, 64, 4), (8, 80, 4), (8, 80, 2), (16, 80, 4))
"""Ranks, slots, ranks a node."""
BATCHES = 4


def measure(ids_TK: np.ndarray, experts: int, ranks: int, slots: int, node_size: int) -> dict[str, Any]:
    """Of each split the busiest rank over the mean, the part of all choices that cross, and CPU time a batch."""
    seen_TK, unseen_TK = np.array_split(ids_TK, 2)
    pairs = Pairs.of_routes([seen_TK], experts)
    loads, affinity = Loads.of(pairs.loads_YE), Affinity(pairs)
    layout = plan(loads, ranks=ranks, slots=slots, node_size=node_size, affinity=affinity).layers[0]

    def nearest(counts_RE: np.ndarray, layout: Layout, node_size: int) -> np.ndarray:
        quotas = [nearest_quota(counts_E, layout, rank, node_size) for rank, counts_E in enumerate(counts_RE)]
        return np.sum(quotas, axis=0)

    splits: dict[str, Callable[[np.ndarray, Layout, int], np.ndarray]] = {
        "nearest": nearest,
        "level": lambda counts_RE, layout, _: level_shares(counts_RE.sum(axis=0), layout),
        "level_by_node": level_by_node_shares,
    }
    found: dict[str, Any] = {}
    for name, split in splits.items():
        each = []
        for batch_TK in np.array_split(unseen_TK, BATCHES):
            parts = np.array_split(batch_TK.reshape(-1), ranks)
            counts_RE = np.array([np.bincount(part, minlength=experts) for part in parts])
            shares_P = split(counts_RE, layout, node_size)
            start = time.thread_time()
            split(counts_RE, layout, node_size)
            seconds = time.thread_time() - start
            counts_ME = counts_RE.reshape(ranks // node_size, node_size, -1).sum(axis=1)
            crossing = 1 - at_home(shares_P, counts_ME, layout, node_size) / counts_RE.sum()
            each.append((imbalances(shares_P[None], layout)[0], crossing, seconds * 1e6))
        busiest, crossing, microseconds = np.mean(each, axis=0)
        found |= {f"{name}": f"{busiest:.3f}, {crossing:.1%}"}
        found |= {f"{name}_us": microseconds} if name != "nearest" else {}
    return found


def rows_of(paths: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name, *shape in () if paths else SHAPES:
        model = find_model(name)
        ids_TK = synthetic_routes(40_000, model.experts, model.topk, seed=0)
        rows.append({"routes": name, "ranks_slots_node": shape, **measure(ids_TK, model.experts, *shape)})
    for path in paths:
        ids_TK = np.load(path)["topk_ids_TK"].astype(np.int64)
        experts = int(ids_TK.max()) + 1
        rows += [
            {"routes": path, "ranks_slots_node": shape, **measure(ids_TK, experts, *shape)}
            for shape in RECORDED
        ]
    return rows


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("routes", nargs="*", help="npz files of recorded routes")
    print_table("busiest rank over the mean, choices that cross", rows_of(parser.parse_args().routes))
