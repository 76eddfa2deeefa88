"""What it costs to bring rows to their experts and back, and what the cutoff saves in memory.

Ranks are processes of this machine with one thread each, joined by the CPU's process group and, beside it, by gloo. The
cost of a dispatcher is the time of a layer whose experts return their rows as they are. The effect of overlap needs
experts that do work: it is measured with float32 experts.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from benchmarks.local_ranks import run_on_ranks
from benchmarks.report import command_line, print_table, save
from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.choose import choose
from epbackend.kernels import ExpertWeights
from epbackend.kernels.cpu.kernels import CpuKernels

E, D, F, K = 32, 1024, 512, 4
TOKENS = (1, 16, 256, 2048)
REPETITIONS = 9
WAYS = {
    "replicated": DispatchSettings(level=1),
    "allgather": DispatchSettings(level=1, dispatcher="allgather"),
    "alltoall": DispatchSettings(level=2, overlap_chunks=1),
}
FORMS = {
    f"{name}{' static' if static else ''}{'' if dispatch_dtype == 'full' else f' {dispatch_dtype}'}": replace(
        WAYS[name], static=static, dispatch_dtype=dispatch_dtype
    )
    for name in ("allgather", "alltoall")
    for static in (False, True)
    for dispatch_dtype in ("full", "int8", "fp8")
}
"""Exact and static calls, and what rows travel as."""
OVERLAP_TOKENS = (256, 1024, 4096)
CUTOFF_TOKENS = 8192


def same_tokens(ranks: RankGroup) -> RankGroup:
    """The ranks, all of them holding the same tokens."""
    return replace(ranks, token_group=ranks.group, token_rank=ranks.rank, token_size=ranks.size)


def layer_ms(
    ranks: RankGroup, settings: DispatchSettings, tokens: int, weights: ExpertWeights | None
) -> float:
    """Median milliseconds of a layer call with `tokens` tokens on each rank; without weights, only their travel."""
    kernels = CpuKernels()
    dispatcher, _ = choose(LayerSpec(ranks, get_device("cpu"), kernels, settings, E // ranks.size, K))
    torch.manual_seed(ranks.rank // ranks.token_size)
    hidden_TD, weights_TK = torch.randn(tokens, D), torch.rand(tokens, K)
    turns = []
    for _ in range(REPETITIONS):
        slot_ids_TK = torch.rand(tokens, E).argsort(1)[:, :K]
        if ranks.group is not None:
            dist.barrier(ranks.group)
        start = time.perf_counter()
        exchange = dispatcher.begin(hidden_TD, slot_ids_TK, weights_TK)
        for batch in exchange.dispatch():
            rows_SD = kernels.expert_mlp(batch.rows_SD, batch.counts_L, weights) if weights else batch.rows_SD
            exchange.combine(rows_SD)
        exchange.finish()
        turns.append(1e3 * (time.perf_counter() - start))
    return median(turns)


def travel_costs(ranks: RankGroup) -> dict[tuple[str, int], float]:
    """Milliseconds by (dispatcher, tokens in all): replicated holds them all on each rank, the others a part each."""
    return {
        (name, tokens * ranks.size): layer_ms(*_share(name, ranks, tokens), None)
        for name in WAYS
        for tokens in TOKENS
    }


def form_costs(ranks: RankGroup) -> dict[tuple[str, int], float]:
    """Milliseconds by (form, tokens of each rank)."""
    return {
        (name, tokens): layer_ms(ranks, settings, tokens, None)
        for name, settings in FORMS.items()
        for tokens in TOKENS
    }


def _share(name: str, ranks: RankGroup, tokens: int) -> tuple[RankGroup, DispatchSettings, int]:
    if name == "replicated":
        return same_tokens(ranks), WAYS[name], tokens * ranks.size
    return ranks, WAYS[name], tokens


def overlap_gain(ranks: RankGroup) -> dict[tuple[int, int], float]:
    """Milliseconds of a whole alltoall layer by (tokens of each rank, chunks)."""
    kernels, slots = CpuKernels(), E // ranks.size
    weights = ExpertWeights(
        kernels.prepack(torch.randn(slots, 2 * F, D)), kernels.prepack(torch.randn(slots, D, F))
    )
    return {
        (tokens, chunks): layer_ms(
            ranks, DispatchSettings(level=2, overlap_chunks=chunks, overlap_min_tokens=0), tokens, weights
        )
        for tokens in OVERLAP_TOKENS
        for chunks in (1, 2, 4)
    }


def peak_memory(ranks: RankGroup, factor: float | None) -> tuple[float, int]:
    """(MiB that one layer call adds to the process's peak, passes)."""
    kernels = CpuKernels()
    settings = DispatchSettings(level=1, topk_scaling_factor=factor, cutoff_min_tokens=1)
    dispatcher, _ = choose(LayerSpec(ranks, get_device("cpu"), kernels, settings, E, K))
    weights = ExpertWeights(kernels.prepack(torch.randn(E, 2 * F, D)), kernels.prepack(torch.randn(E, D, F)))
    slot_ids_TK = torch.rand(CUTOFF_TOKENS, E).argsort(1)[:, :K]
    hidden_TD, weights_TK = torch.randn(CUTOFF_TOKENS, D), torch.rand(CUTOFF_TOKENS, K)
    before = peak_mib()
    exchange = dispatcher.begin(hidden_TD, slot_ids_TK, weights_TK)
    for batch in exchange.dispatch():
        exchange.combine(kernels.expert_mlp(batch.rows_SD, batch.counts_L, weights))
        del batch
    exchange.finish()
    return peak_mib() - before, exchange.passes


def peak_mib() -> float:
    """The process's peak so far. (Not getrusage: its peak may be that of the process which started this one.)"""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def picture(costs: list[dict], memory: list[dict]) -> Figure:
    """Travel against tokens, one panel for each number of ranks, and the peak memory."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    sizes = sorted({row["ranks"] for row in costs})
    *panels, last = figure.subplots(1, len(sizes) + 1)
    for size, axes in zip(sizes, panels, strict=True):
        for name in WAYS:
            line = [row for row in costs if row["ranks"] == size and row["dispatcher"] == name]
            axes.loglog([row["tokens"] for row in line], [row["ms"] for row in line], marker="o", label=name)
        axes.set(title=f"Travel, {size} ranks", xlabel="tokens in all", ylabel="ms a layer")
        axes.grid(alpha=0.3)
        axes.legend()
    names = [f"factor {row['topk_scaling_factor']}" for row in memory]
    bars = last.bar(names, [row["peak MiB"] for row in memory], color="#1b6ca8")
    last.bar_label(bars, [f"passes: {row['passes']}" for row in memory])
    last.set(title=f"Peak memory of a level 1 layer, {CUTOFF_TOKENS} tokens", ylabel="MiB")
    return figure


def main() -> None:
    costs, forms, overlap = [], [], []
    for size in (2, 4):
        ours, gloo = (_slowest(run_on_ranks(size, travel_costs, backend=each)) for each in (None, "gloo"))
        costs += [
            {"ranks": size, "dispatcher": name, "tokens": tokens, "ms": ms, "ms by gloo": gloo[name, tokens]}
            for (name, tokens), ms in ours.items()
        ]
    for (name, tokens), ms in _slowest(run_on_ranks(2, form_costs)).items():
        forms.append({"ranks": 2, "form": name, "tokens a rank": tokens, "ms": ms})
    ours, gloo = (_slowest(run_on_ranks(2, overlap_gain, backend=each)) for each in (None, "gloo"))
    for (tokens, chunks), ms in ours.items():
        row = {"ranks": 2, "tokens a rank": tokens, "chunks": chunks, "ms": ms}
        overlap.append(row | {"ms by gloo": gloo[tokens, chunks]})
    memory = []
    for factor in (None, 0.5, 0.25):
        (mib, passes), *_ = run_on_ranks(1, peak_memory, factor)
        memory.append({"topk_scaling_factor": str(factor), "peak MiB": mib, "passes": passes})
    shape = f"{E} experts, {D} x {F}, top-{K}, float32"
    print_table(f"Travel alone: {shape}", costs)
    print_table(f"Exact and static calls, rows in full or in 8 bits: {shape}", forms)
    print_table(f"alltoall in overlapped chunks, whole layer: {shape}", overlap)
    print_table(f"Cutoff: what a layer of {CUTOFF_TOKENS} tokens adds to the peak memory", memory)
    figures = {
        "shape": {"E": E, "D": D, "F": F, "K": K},
        "travel": costs,
        "forms": forms,
        "overlap": overlap,
        "cutoff": memory,
    }
    save("dispatchers", figures, picture(costs, memory))


def _slowest(answers: list[dict]) -> dict:
    """A collective is done when the last rank is."""
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    main()
