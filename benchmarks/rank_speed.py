"""Four ranks, one of which computes at half the speed: a placement planned with its speed beside one without.

`python -m benchmarks.rank_speed`: one MoE layer on processes of this machine. The slow rank rests after its
experts for as long as they took it of its core, as under a limit of half a core. Both placements are in place at once
and take turns call by call, so that other work on the machine meets both.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.local_ranks import run_on_ranks
from benchmarks.report import command_line, print_table
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.moe import ExpertParallelMoE
from epbackend.placement import Placement, plan
from epbackend.placement.score import score
from epbackend.placement.warmup import warm_up
from epbackend.replica_split import SlotMap

RANKS, SLOW = 4, 2
SPEEDS = [1.0, 1.0, 0.5, 1.0]
E, D, F, K, TOKENS = 32, 256, 512, 4, 128
SLOTS = 40
PAIRS = 20


def chances_E() -> np.ndarray:
    """How likely each expert is chosen: skewed as routers are."""
    weight_E = np.random.default_rng(0).lognormal(0, 0.8, E)
    return weight_E / weight_E.sum()


def placements(split: str) -> dict[str, Placement]:
    """One that takes all ranks to be alike, and one that knows better."""
    options = {"split": "level"} if split == "level" else {}
    asked: dict[str, Any] = {"ranks": RANKS, "slots": SLOTS, **options}
    return {
        "without": plan(chances_E()[None], **asked),
        "with": plan(chances_E()[None], rank_speed=SPEEDS, **asked),
    }


def calls(ranks: RankGroup, split: str, places: dict[str, Placement]) -> tuple[dict[str, list[float]], float]:
    """Seconds of each call by placement, and by how much the outputs differ at most."""
    draw = torch.Generator().manual_seed(1)
    gate_up = torch.randn(E, 2 * F, D, generator=draw) / D**0.5
    down = torch.randn(E, D, F, generator=draw) / F**0.5
    layers = {}
    for name, placement in places.items():
        slot_map = SlotMap(placement.layers[0], rank_speed=placement.rank_speed)
        mine = list(slot_map.local_experts(ranks.rank))
        layers[name] = ExpertParallelMoE(
            gate_up[mine],
            down[mine],
            slot_map=slot_map,
            ranks=ranks,
            settings=DispatchSettings(level=2),
            split=split,
            top_k=K,
        )
        if ranks.rank == SLOW:
            _slow_down(layers[name])
    random = np.random.default_rng(2 + ranks.rank)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    differs = 0.0
    for _ in range(PAIRS + 2):
        ids_TK = torch.from_numpy(
            np.stack([random.choice(E, K, replace=False, p=chances_E()) for _ in range(TOKENS)])
        )
        hidden_TD, weights_TK = torch.randn(TOKENS, D), torch.full((TOKENS, K), 1 / K)
        outs = []
        for name, layer in layers.items():
            dist.barrier()
            began = time.perf_counter()
            outs.append(layer(hidden_TD, ids_TK, weights_TK))
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
        differs = max(differs, float((outs[0] - outs[1]).abs().max()))
    for layer in layers.values():
        layer.close()
    return {name: each[2:] for name, each in seconds.items()}, differs


def _slow_down(layer: ExpertParallelMoE) -> None:
    """Its experts take twice as long."""
    expert_mlp = layer._kernels.expert_mlp

    def resting(*args: Any, **named: Any) -> Any:
        began = time.thread_time()
        rows_SD = expert_mlp(*args, **named)
        time.sleep(time.thread_time() - began)
        return rows_SD

    mock.patch.object(layer._kernels, "expert_mlp", resting).start()


def row(split: str) -> dict[str, Any]:
    """One line of the table: medians of the paired calls."""
    places = placements(split)
    seconds, differs = run_on_ranks(RANKS, calls, split, places)[0]
    expected = {
        name: score(placement, chances_E()[None], split=split, rank_speed=SPEEDS).imbalance_mean
        for name, placement in places.items()
    }
    ratio = np.array(seconds["without"]) / np.array(seconds["with"])
    return {
        "split": split,
        **{f"ms {name} speeds": f"{1e3 * np.median(each):.1f}" for name, each in seconds.items()},
        "faster (median of pairs)": f"{np.median(ratio):.2f}",
        "quartiles": "{:.2f} to {:.2f}".format(*np.quantile(ratio, (0.25, 0.75))),
        "slowest rank over the mean: without, with": "{without:.3f}, {with:.3f}".format(**expected),
        "outputs differ by": f"{differs:.1e}",
    }


def main() -> None:
    warm_up()
    rows = [row(split) for split in ("even", "level")]
    print_table(f"{RANKS} ranks, rank {SLOW} at half the speed", rows)


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    main()
