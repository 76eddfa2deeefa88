"""Milliseconds of one MoE layer on NPUs, for each dispatcher: DeepSeek-V3's sizes, with a quarter of its experts.

    python -m torch.distributed.run --nproc-per-node 8 -m benchmarks.ascend_layer

Needs NPUs, torch-npu and CANN; every rank takes one NPU. Rank 0 prints the table and writes it to
benchmarks/results/ascend_layer.json. Weights are random: neither the time nor the traffic depends on them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import print_table
from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.int8 import Int8Matrix
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

SIZES = {"experts": 64, "hidden": 7168, "width": 2048, "top_k": 8}
TOKENS = (1, 16, 64, 256)
REPETITIONS = 20
RESULT = Path(__file__).parent / "results" / "ascend_layer.json"


def ways(tokens: int) -> dict[str, DispatchSettings]:
    return {
        "allgather": DispatchSettings(level=1, dispatcher="allgather"),
        "alltoall": DispatchSettings(level=2, dispatcher="alltoall"),
        "mc2": DispatchSettings(level=2, dispatcher="mc2", max_tokens=tokens),
        "mc2, int8 rows": DispatchSettings(
            level=2, dispatcher="mc2", max_tokens=tokens, dispatch_dtype="int8"
        ),
    }


def measure(
    ranks: RankGroup, place: torch.device, sizes: dict[str, int], tokens: int, way: str, int8: bool
) -> float:
    """Median milliseconds of a layer call with `tokens` tokens on each rank."""
    experts, hidden, width, top_k = sizes.values()
    slot_map = SlotMap.uniform(experts, ranks.size)
    layer = ExpertParallelMoE(
        _random_matrices(slot_map.slots_per_rank, 2 * width, hidden, place, int8),
        _random_matrices(slot_map.slots_per_rank, hidden, width, place, int8),
        slot_map=slot_map,
        ranks=ranks,
        settings=ways(tokens)[way],
        top_k=top_k,
        device="ascend",
    )
    hidden_TD = torch.randn(tokens, hidden).bfloat16().to(place)
    ids_TK = torch.rand(tokens, experts).argsort(1)[:, :top_k].to(place)
    weights_TK = torch.rand(tokens, top_k).to(place)
    npu = torch.get_device_module("npu")
    layer(hidden_TD, ids_TK, weights_TK)
    turns = []
    for _ in range(REPETITIONS):
        dist.barrier(ranks.group)
        start, end = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
        start.record()
        layer(hidden_TD, ids_TK, weights_TK)
        end.record()
        end.synchronize()
        turns.append(start.elapsed_time(end))
    return median(turns)


def _random_matrices(count: int, rows: int, columns: int, place: torch.device, int8: bool) -> list[Any]:
    if not int8:
        return [torch.randn(rows, columns).bfloat16().to(place) for _ in range(count)]
    scale = torch.full((rows,), 1e-3, device=place)
    values = [torch.randint(-127, 128, (rows, columns), dtype=torch.int8) for _ in range(count)]
    return [Int8Matrix(each.to(place), scale) for each in values]


def main() -> None:
    device = get_device("ascend")
    place = device.torch_device(int(os.environ["LOCAL_RANK"]))
    torch.get_device_module("npu").set_device(place)
    dist.init_process_group(device.collective_backend)
    ranks = RankGroup.of(dist.group.WORLD)
    rows = [
        {
            "ranks": ranks.size,
            "tokens a rank": tokens,
            "dispatcher": way,
            "weights": "int8" if int8 else "bfloat16",
            "ms": measure(ranks, place, SIZES, tokens, way, int8),
        }
        for int8 in (False, True)
        for tokens in TOKENS
        for way in ways(tokens)
    ]
    if ranks.rank == 0:
        print_table(f"MoE layer on {torch.get_device_module('npu').get_device_name()}: {SIZES}", rows)
        RESULT.write_text(json.dumps({"sizes": SIZES, "layer": rows}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
