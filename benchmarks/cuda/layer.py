"""One MoE layer as decoding and prefill run it, in a CUDA graph, beside LMDeploy's own: time, launches, host time.

    python -m benchmarks.cuda.layer [--tokens 1 16 64 256 1024 4096 32768] [--lmdeploy FOLDER] [--out FILE]

Qwen3-30B's shape in bfloat16, the router's choices given. Several layers with weights of their own follow each other in
a graph, so that no cache holds a layer's weights until its turn comes round. All take turns. "gathered" are our layers
whose first product reads its rows where the tokens lie, whatever the table of tiles says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda.cases import QWEN3, gathering
from benchmarks.cuda.lmdeploy import LMDeploy
from benchmarks.cuda.report import Report, machine_facts
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels import ExpertWeights
from epbackend.kernels.triton.tuning import ExpertShape
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

LAYERS = 4
TURNS, REPLAYS = 9, 20
DECODED = 256
"""The largest batch that decodes; larger ones are prefill."""
RESULTS = Path(__file__).parents[1] / "results"


class Layers:
    """The same layers by each, and what they are given."""

    def __init__(self, lmdeploy: LMDeploy | None, experts: ExpertShape, device: torch.device) -> None:
        self._lmdeploy, self._experts, self._device = lmdeploy, experts, device
        self._weights = [ExpertWeights(*experts.weights("half", device)) for _ in range(LAYERS)]
        self._ours, self._gathered = self._layers(), self._layers()

    def _layers(self) -> list[ExpertParallelMoE]:
        experts = self._experts
        settings = {
            "prefill": DispatchSettings(),
            "decode": DispatchSettings(static=True, max_tokens=DECODED),
        }
        return [
            ExpertParallelMoE(
                weights.gate_up,
                weights.down,
                slot_map=SlotMap.uniform(experts.slots, 1),
                ranks=RankGroup.single(),
                settings=settings,
                top_k=experts.top_k,
                renormalize=True,
                device="cuda",
                layer=number,
            )
            for number, weights in enumerate(self._weights)
        ]

    def calls(self, tokens: int) -> dict[str, Callable[[], Tensor]]:
        """Who -> all layers once."""
        experts, device = self._experts, self._device
        hidden_TD = torch.randn(tokens, experts.D, device=device, dtype=torch.bfloat16)
        scores = torch.randn(LAYERS, tokens, experts.slots, device=device).softmax(-1).topk(experts.top_k)
        phase = "decode" if tokens <= DECODED else "prefill"

        def by(layers: list[ExpertParallelMoE]) -> Tensor:
            out_TD = hidden_TD
            for layer, weights_TK, ids_TK in zip(layers, scores.values, scores.indices, strict=True):
                out_TD = layer(out_TD, ids_TK, weights_TK, phase=phase)
            return out_TD

        def theirs() -> Tensor:
            out_TD = hidden_TD
            for weights, weights_TK, ids_TK in zip(self._weights, scores.values, scores.indices, strict=True):
                out_TD = self._lmdeploy.half(out_TD, weights, weights_TK, ids_TK, renormalize=True)
            return out_TD

        with gathering():
            by(self._gathered)
        both = {"epbackend": partial(by, self._ours), "gathered": partial(by, self._gathered)}
        return both | ({"LMDeploy": theirs} if self._lmdeploy else {})


def captured(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    for _ in range(3):  # compiles and tunes
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Of one layer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / REPLAYS / LAYERS


def host_us(call: Callable[[], Tensor]) -> float:
    """What an eager call of one layer takes the host, which waits for nothing: the best of a few."""
    times = []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return min(times) * 1e6 / LAYERS


def launches(graph: torch.cuda.CUDAGraph) -> dict[str, dict[str, float]]:
    """Kernel -> how often in one layer, and its microseconds there; copies and fills count as kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    once = REPLAYS * LAYERS
    events = [each for each in seen.key_averages() if each.self_device_time_total]
    events.sort(key=lambda each: -each.self_device_time_total)
    return {
        each.key[:80]: {"launches": each.count / once, "us": each.self_device_time_total / once}
        for each in events
    }


def measure(layers: Layers, tokens: int) -> list[dict[str, Any]]:
    calls = layers.calls(tokens)
    graphs = {who: captured(call) for who, call in calls.items()}
    outputs = [call().float() for call in calls.values()]
    differs = max(float((each - outputs[0]).norm() / outputs[0].norm()) for each in outputs[1:])
    times: dict[str, list[float]] = {who: [] for who in graphs}
    for _ in range(TURNS):
        for who, graph in graphs.items():
            times[who].append(replay_us(graph))
    rows = []
    for who, graph in graphs.items():
        kernels = launches(graph)
        row = {"tokens": tokens, "by": who, "us": median(times[who]), "fastest_us": min(times[who])}
        row |= {
            "launches": sum(each["launches"] for each in kernels.values()),
            "host_us": host_us(calls[who]),
        }
        rows.append(row | {"differs": differs, "kernels": kernels})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.layer")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096, 32768])
    parser.add_argument("--lmdeploy", type=Path, help="folder of an unpacked LMDeploy wheel")
    parser.add_argument("--out", type=Path, default=RESULTS / "cuda-layer.json")
    asked = parser.parse_args()
    torch.manual_seed(0)
    report = Report(asked.out, machine_facts())
    layers = Layers(LMDeploy.found(asked.lmdeploy), QWEN3, torch.device("cuda", 0))
    for tokens in asked.tokens:
        with torch.inference_mode():
            for row in measure(layers, tokens):
                report.add(row)
                print(line_of(row), flush=True)


def line_of(row: dict[str, Any]) -> str:
    return (
        f"T={row['tokens']:<6}{row['by']:12}{row['us']:9.1f} us a layer, {row['launches']:.1f} launches, "
        f"host {row['host_us']:.0f} us; they differ by {row['differs']:.4f}"
    )


if __name__ == "__main__":
    main()
