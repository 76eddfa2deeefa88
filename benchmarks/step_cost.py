"""What watching the experts costs a step: counting rows by phase, sending them to the host, the board of migrations.

    python -m benchmarks.step_cost                       # 58 layers of 256 experts on the CPU, then the engine
    python -m benchmarks.step_cost --place cuda          # the counters on a GPU
    python -m benchmarks.step_cost --pairs 0             # host time and layers alone

Wanted: `step` under 20 us, and under 1% between steps of all layers, or runs of the engine, with it and without. They
take turns (with, without, without, with), and are compared by processor time. The layers are far smaller than a real
model's with as many experts, so that what is measured is the most it can be.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

import epbackend
from benchmarks.report import command_line, machine, print_table
from epbackend.balance.board import PLACE
from epbackend.balance.migration import Migrator
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.dispatch.context import GroupContext
from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE, SharedStats
from epbackend.engines.lmdeploy.load.stats_writer import StatsWriter
from epbackend.moe import ExpertParallelMoE, LayerStats
from epbackend.names import Phase
from epbackend.replica_split import SlotMap

PROMPTS, NEW_TOKENS = 4, 32
HIDDEN, WIDTH, TOP_K = 128, 64, 8
STEPS: dict[Phase, int] = {"decode": 8, "prefill": 64}
"""Tokens of a step of layers."""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256, help="of each layer on this rank")
    parser.add_argument("--place", default="cpu", help="device of the counters")
    parser.add_argument("--model", default="tiny-qwen3-moe")
    parser.add_argument(
        "--pairs", type=int, default=40, help="runs of the engine with and without the report"
    )
    parser.add_argument("--step-pairs", type=int, default=80, help="steps of all layers, watched and not")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print_table(
        f"host microseconds, {args.layers} layers of {args.experts} experts on {args.place}", host_rows(args)
    )
    if args.place == "cpu":
        title = f"a step of {args.layers} layers of {args.experts} experts, watched and not"
        print_table(title, [layers_row(args, phase, tokens) for phase, tokens in STEPS.items()])
    if args.pairs:
        print_table(f"{args.model} on the CPU, with the report and without", [engine_row(args)])


def host_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The serving thread's part, once a step, and the other thread's, four times a second."""
    stats = SharedStats(1)
    with mock.patch.dict(os.environ, {STATS_VARIABLE: stats.variable}):
        writer, layers = StatsWriter(), [layer(args.experts, args.place) for _ in range(args.layers)]
        for number, each in enumerate(layers):
            writer.watch(0, number, each, each.place)
        writer.step()
        counters = writer._counters
        assert counters is not None
        rows = [
            {
                "what": "choosing the phase's counters, in all layers",
                **times(lambda: [each.load.rows_on(each.place, "decode") for each in layers], args.place),
            },
            {"what": "step, in the serving thread", **times(writer.step, args.place)},
            {
                "what": "write down, in the thread beside",
                **times(lambda: writer._write_down(counters)),
            },
            {"what": "report, in the parent (it waits for the thread)", **times(stats.report, repeat=1)},
        ]
        writer.close()
    stats.remove()
    return rows


def layers_row(args: argparse.Namespace, phase: Phase, tokens: int) -> dict[str, Any]:
    """All that balance does on the serving path while nothing moves, beside layers that do not even count."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 16

    stats, places = SharedStats(1), np.zeros(1, PLACE)
    context, place = GroupContext(), torch.device("cpu")
    gate_up, down = numbers(args.experts, 2 * WIDTH, HIDDEN), numbers(args.experts, HIDDEN, WIDTH)
    hidden = numbers(tokens, HIDDEN)
    ids = torch.rand(tokens, args.experts, generator=generator).argsort(1)[:, :TOP_K]
    shares = torch.full((tokens, TOP_K), 1 / TOP_K)
    layers = [
        ExpertParallelMoE(
            gate_up,
            down,
            slot_map=SlotMap.uniform(args.experts, 1),
            ranks=RankGroup.single(),
            settings=DispatchSettings(),
            top_k=TOP_K,
            layer=number,
            context=context,
        )
        for number in range(args.layers)
    ]
    with mock.patch.dict(os.environ, {STATS_VARIABLE: stats.variable}):
        writer, migrator = StatsWriter(), Migrator(places, 0, place, 1 << 20)
        for number, each in enumerate(layers):
            writer.watch(0, number, each, place)
            migrator.watch(number, each)

        def step(watched: bool) -> float:
            counts = nullcontext() if watched else mock.patch.object(LayerStats, "rows_on", _not_counted)
            with counts:
                began = time.thread_time()
                if watched:
                    migrator.begin_step()
                for each in layers:
                    each(hidden, ids, shares, phase)
                if watched:
                    writer.step()
                return 1e3 * (time.thread_time() - began)

        step(True), step(False)
        pairs = []
        for pair in range(args.step_pairs):
            found = {watched: step(watched) for watched in ((True, False) if pair % 2 else (False, True))}
            pairs.append((found[True], found[False]))
        counted_L = torch.ones(args.experts, dtype=torch.int64)
        parts = (
            migrator.begin_step,
            writer.step,
            lambda: [each.load.rows_on(place, phase).add_(counted_L) for each in layers],
        )
        alone = sum(times(part)["best"] for part in parts)
        writer.close()
    migrator.close()
    context.close()
    stats.remove()
    ratios = [100 * (watched / bare - 1) for watched, bare in pairs]
    quarters, usual = statistics.quantiles(ratios), statistics.median(bare for _, bare in pairs)
    return {
        "phase": phase,
        "tokens": tokens,
        "ms, not watched": usual,
        "more, median of pairs": f"{quarters[1]:+.2f}%",
        "its standard error": f"{0.93 * (quarters[2] - quarters[0]) / len(ratios) ** 0.5:.2f}%",
        "the parts alone": f"{alone:.0f} us, {alone / usual / 10:.2f}%",
    }


def _not_counted(*_: Any) -> None:
    """In place of `LayerStats.rows_on`, and as quick as it; a Mock is not."""


def layer(experts: int, place: str) -> Any:
    """What the writer needs of an ExpertParallelMoE."""
    load = LayerStats(tuple(range(experts)), experts)
    load.add_call(passes=1, rounds=1)
    where = torch.zeros(1, device=place).device
    slot_map, ranks = SimpleNamespace(experts=experts), SimpleNamespace(token_rank=0)
    return SimpleSpace(load=load, slot_map=slot_map, ranks=ranks, dispatchers={}, top_k=TOP_K, place=where)


class SimpleSpace(SimpleNamespace):
    """A SimpleNamespace that can be referred to weakly."""


def times(
    call: Callable[[], Any], place: str = "cpu", repeat: int = 200, rounds: int = 25
) -> dict[str, float]:
    """Microseconds of a call. The best round is what it costs; the median has what else the machine does."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        found.append((time.perf_counter() - began) / repeat * 1e6)
        if place != "cpu":
            torch.get_device_module(place).synchronize()  # its queue must not fill up
    return {"best": min(found), "median": statistics.median(found)}


def engine_row(args: argparse.Namespace) -> dict[str, Any]:
    """Runs that take turns: what else the machine does hits both."""
    from lmdeploy import GenerationConfig

    config = epbackend.EPConfig.load({"device": "cpu", "engine": {"log_level": "ERROR", "session_len": 256}})
    gen = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False)
    prompts = [f"Once upon a time there were {number} ranks" for number in range(PROMPTS)]
    with epbackend.pipeline(args.model, config) as pipe:
        spent = {"step": 0.0, "_write_down": 0.0}

        def clocked(name: str) -> Callable[..., Any]:
            method = getattr(StatsWriter, name)

            def timed(*args: Any) -> Any:
                began = time.thread_time()
                try:
                    return method(*args)
                finally:
                    spent[name] += time.thread_time() - began

            return timed

        def run(report: bool) -> tuple[float, float]:
            """Seconds on the wall, and of processor time of all threads, on which other programs tell less."""
            with (
                mock.patch.object(StatsWriter, "step", clocked("step") if report else lambda writer: None),
                mock.patch.object(StatsWriter, "_write_down", clocked("_write_down")),
            ):
                began = time.perf_counter(), time.process_time()
                pipe(prompts, gen_config=gen, do_preprocess=False)
                return time.perf_counter() - began[0], time.process_time() - began[1]

        run(True)
        spent |= dict.fromkeys(spent, 0.0)
        with_it: list[tuple[float, float]] = []
        without: list[tuple[float, float]] = []
        for pair in range(args.pairs):
            for report in (True, False) if pair % 2 else (False, True):
                (with_it if report else without).append(run(report))
    row = {"pairs": args.pairs, "tokens/s without": PROMPTS * NEW_TOKENS / min(wall for wall, _ in without)}
    whole = sum(processor for _, processor in with_it)
    row |= {f"of the processor time, {name}": f"{100 * spent[name] / whole:.3f}%" for name in spent}
    for at, clock in enumerate(("wall", "processor")):
        ratios = [100 * (a[at] / b[at] - 1) for a, b in zip(with_it, without, strict=True)]
        row[f"more {clock} time, median of pairs"] = f"{statistics.median(ratios):+.2f}%"
        if len(ratios) > 1:
            row[f"standard error ({clock})"] = f"{statistics.stdev(ratios) / len(ratios) ** 0.5:.2f}%"
    return row


if __name__ == "__main__":
    main()
