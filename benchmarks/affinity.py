"""What plans with affinity bring on tokens that they have not seen: nodes, ranks, bytes, balance and planning time.

`python -m benchmarks.affinity [ROUTES.npz ...]`: on synthetic topics; of files the array `topk_ids_TK` of one layer,
cut into halves. It prints a table.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.report import command_line, print_table
from epbackend.balance.cost import MODELS, find_model
from epbackend.placement import Affinity, Layout, Loads, Pairs, assign, nearest_quota, plan
from epbackend.placement.score import score
from epbackend.placement.synthetic import synthetic_routes
from epbackend.placement.visits import Visits

SHAPES = (
    ("deepseek-v3", 16, 272),
    ("deepseek-v3", 32, 288),
    ("deepseek-v3", 32, 320),
    ("deepseek-v3", 64, 320),
    ("qwen3-30b", 16, 128),
    ("qwen3-30b", 32, 160),
)
NODE = 8
RECORDED = ((4, 0, 2), (8, 4, 2), (8, 20, 2), (8, 20, 4), (16, 20, 2), (16, 20, 4))
"""Ranks, replicas, ranks a node."""
REPETITIONS = 7


def visits_of_routes(topk_ids_TK: np.ndarray, layout: Layout, node_size: int = 0) -> Visits:
    """Token by token: token t comes from rank t % R, and takes the replicas that `nearest` gives it.

    Args:
        topk_ids_TK: the experts of each token.
        layout: of the layer.
        node_size: ranks per node; 0: all ranks are one node.
    """
    ranks, size = layout.ranks, node_size or layout.ranks
    visited_RR = np.zeros((ranks, ranks))
    nodes_MM = np.zeros((ranks // size, ranks // size))
    for source in range(ranks):
        own_TK = topk_ids_TK[source::ranks]
        counts_E = np.bincount(own_TK.reshape(-1), minlength=layout.experts)
        slots_TK = assign(own_TK, nearest_quota(counts_E, layout, source, node_size), layout)
        goes_TR = np.zeros((len(own_TK), ranks), dtype=bool)
        np.put_along_axis(goes_TR, layout.rank_of_slot_P[slots_TK], True, axis=1)
        visited_RR[source] = goes_TR.sum(axis=0)
        nodes_MM[source // size] += goes_TR.reshape(len(own_TK), -1, size).any(axis=2).sum(axis=0)
    tokens_M1 = np.array([len(topk_ids_TK[source::ranks]) for source in range(ranks)])
    tokens_M1 = tokens_M1.reshape(-1, size).sum(axis=1)[:, None]
    ranks_MM = visited_RR.reshape(ranks // size, size, ranks // size, size).sum(axis=(1, 3))
    tokens = len(topk_ids_TK)
    return Visits(
        float(ranks_MM.sum() / tokens),
        float(nodes_MM.sum() / tokens),
        nodes_MM / np.maximum(tokens_M1, 1),
        ranks_MM / np.maximum(tokens_M1, 1),
    )


def measure(
    seen_TK: np.ndarray, unseen_TK: np.ndarray, experts: int, ranks: int, slots: int, node_size: int, row: int
) -> dict[str, Any]:
    """The plan without affinity and with it, in pairs (before, after)."""
    pairs = Pairs.of_routes([seen_TK], experts)
    loads, affinity = Loads.of(pairs.loads_YE), Affinity(pairs)
    balanced = plan(loads, ranks=ranks, slots=slots, node_size=node_size)
    layout, seconds = balanced.layers[0], []
    for _ in range(REPETITIONS):
        start = time.thread_time()
        affinity.gather(0, layout, loads.tokens_WYE[:, 0], node_size)
        seconds.append(time.thread_time() - start)
    gathered = plan(loads, ranks=ranks, slots=slots, node_size=node_size, affinity=affinity)
    both = balanced, gathered
    visits = [visits_of_routes(unseen_TK, each.layers[0], node_size) for each in both]
    return {
        "other_nodes": [each.other_nodes for each in visits],
        "ranks": [each.ranks for each in visits],
        "kb_across": [each.bytes_across(row) / 1e3 for each in visits],
        "kb_within": [each.bytes_within(row) / 1e3 for each in visits],
        "imbalance": [score(each, loads, split="nearest").imbalance_mean for each in both],
        "cpu_ms": [min(seconds[1:]) * 1e3],
    }


def synthetic() -> list[dict[str, Any]]:
    rows = []
    for name, ranks, slots in SHAPES:
        model = find_model(name)
        each = []
        for seed in range(3):
            seen, unseen = (
                synthetic_routes(tokens, model.experts, model.topk, seed=seed, sample=sample)
                for sample, tokens in enumerate((20_000, 5_000))
            )
            each.append(measure(seen, unseen, model.experts, ranks, slots, NODE, model.row_bytes))
        mean = {what: np.mean([found[what] for found in each], axis=0).tolist() for what in each[0]}
        rows.append({"routes": name, "ranks_slots_node": f"{ranks} / {slots} / {NODE}", **mean})
    return rows


def recorded(paths: list[str]) -> list[dict[str, Any]]:
    rows = []
    for path in paths:
        ids_TK = np.load(path)["topk_ids_TK"].astype(np.int64)
        experts, half = int(ids_TK.max()) + 1, len(ids_TK) // 2
        row = MODELS["qwen3-30b"].row_bytes
        for ranks, replicas, node_size in RECORDED:
            slots = -(-(experts + replicas) // ranks) * ranks
            found = measure(ids_TK[:half], ids_TK[half:], experts, ranks, slots, node_size, row)
            rows.append({"routes": path, "ranks_slots_node": f"{ranks} / {slots} / {node_size}", **found})
    return rows


def main(paths: list[str]) -> None:
    rows = recorded(paths) if paths else synthetic()
    shown = [
        {
            what: " to ".join(f"{x:.3f}" for x in value) if isinstance(value, list) else value
            for what, value in row.items()
        }
        for row in rows
    ]
    print_table("balanced to with affinity, on tokens not seen", shown)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("routes", nargs="*", help="npz files of recorded routes")
    main(parser.parse_args().routes)
