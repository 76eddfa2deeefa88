"""Placement and split against their targets, EPLB and HiGHS beside them: one thread, warm, in one run.

`python -m benchmarks.placement [LOADS ...]`: without files on synthetic loads of DeepSeek-V3's shape. Results go to
`placement`, those on files to `placement-recorded`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.report import OURS, PEER, command_line, figure, print_table, save
from epbackend.placement import Loads, Placement, count_moves, plan, read_loads, synthetic_loads
from epbackend.placement.compare import mean_imbalance
from epbackend.placement.replica_split import level_shares
from epbackend.placement.score import rank_costs, score
from epbackend.placement.search.level_split import level_shares as level_kernel
from epbackend.placement.synthetic import CONCENTRATION, draw_batches
from epbackend.placement.warmup import warm_up
from tests.helpers.linear_program import optimum

TARGETS = {  # ranks, slots: mean and worst layer, without search and with it
    (16, 272): (1.0002, None, None, None),
    (32, 288): (1.0005, 1.001, None, None),
    (64, 320): (1.0015, 1.005, 1.001, 1.003),
    (72, 288): (1.004, None, 1.0015, None),
}
SEARCH_MS = 50.0
REPETITIONS = 3

Rows = list[dict[str, Any]]


def timed(work: Callable[[], Any], repetitions: int = REPETITIONS) -> tuple[Any, float]:
    """The answer, and the milliseconds of this thread in the fastest repetition."""
    milliseconds = []
    for _ in range(repetitions):
        start = time.thread_time()
        answer = work()
        milliseconds.append(1e3 * (time.thread_time() - start))
    return answer, min(milliseconds)


def windows(loads: Loads) -> Iterator[Loads]:
    """Each window as loads of its own."""
    for tokens_YE, name in zip(loads.tokens_WYE, loads.names, strict=True):
        yield Loads(tokens_YE[None], (name,))


def published_eplb_ms(window: Loads, ranks: int, slots: int) -> float:
    """Milliseconds of the published EPLB, of which LMDeploy has a copy: the same slots as our `eplb`, in torch."""
    from lmdeploy.pytorch.nn.eplb import rebalance_experts_hierarchical

    weight_YE = torch.from_numpy(window.tokens_WYE[0, list(window.loaded_layers)].astype(np.float32))
    return timed(lambda: rebalance_experts_hierarchical(weight_YE, slots, 1, 1, ranks), 1)[1]


def placements(loads: Loads) -> Rows:
    """Imbalance and time of the default and EPLB on each window."""
    rows = []
    for window in windows(loads):
        layers = len(window.loaded_layers)
        for (ranks, slots), targets in TARGETS.items():
            _, eplb_ms = eplb = timed(lambda: plan(window, ranks=ranks, slots=slots, algorithm="eplb"), 1)  # noqa: B023
            reference = score(eplb[0], window)
            published_ms = published_eplb_ms(window, ranks, slots)
            for search_ms, (mean, worst) in zip((0.0, SEARCH_MS), (targets[:2], targets[2:]), strict=True):
                if mean is None:
                    continue
                asked = {"ranks": ranks, "slots": slots, "search_ms": search_ms}
                ours, ms = timed(lambda: plan(window, **asked), 1 if search_ms else REPETITIONS)  # noqa: B023
                found = score(ours, window)
                rows.append(
                    {
                        "loads": window.names[0],
                        "EP/slots": f"{ranks}/{slots}",
                        "search ms": int(search_ms),
                        "mean": figure(found.imbalance_mean, mean),
                        "worst": figure(found.imbalance_worst, worst),
                        "EPLB mean": f"{reference.imbalance_mean:.4f}",
                        "EPLB worst": f"{reference.imbalance_worst:.4f}",
                        "duplicates, EPLB's": f"{found.duplicates_on_rank}, {reference.duplicates_on_rank}",
                        "ms a layer": figure(ms / layers, None if search_ms else 0.3),
                        "EPLB ms: ours, published": f"{eplb_ms / layers:.2f}, {published_ms / layers:.1f}",
                    }
                )
    return rows


def budgets(loads: Loads) -> Rows:
    """EP144/288: redundant slots in every layer, under each split, or given to the layers that need them."""
    rows = []
    for window in windows(loads):
        budget = (288 - window.experts) * len(window.loaded_layers)
        each, shared = plan(window, ranks=144, slots=288), plan(window, ranks=144, budget=budget)
        for_level = plan(window, ranks=144, slots=288, split="level")
        eplb = plan(window, ranks=144, slots=288, algorithm="eplb")
        by_name = {"decode_in1000out1000": (1.14, 1.12), "prefill_in4096": (1.25, 1.235)}
        weighted, by_need = by_name.get(window.names[0], (None, None))
        rows.append(
            {
                "loads": window.names[0],
                "EPLB": f"{score(eplb, window).imbalance_mean:.4f}",
                "ours": f"{score(each, window).imbalance_mean:.4f}",
                "refined+level, level": figure(
                    score(for_level, window, split="level").imbalance_mean, weighted
                ),
                "by need": figure(score(shared, window).imbalance_mean, by_need),
            }
        )
    return rows


def moves(loads: Loads) -> Rows:
    """From each window to the next: which experts must move, and how balanced the result is."""
    rows = []
    for before, after in pairwise(windows(loads)):
        for (ranks, slots), target in {(32, 288): 15, (64, 320): 25}.items():
            current = plan(before, ranks=ranks, slots=slots)
            ours = plan(after, ranks=ranks, slots=slots, algorithm="incremental", current=current)
            eplb = plan(after, ranks=ranks, slots=slots, algorithm="eplb")
            share, replanned = (
                100 * count_moves(current, new, after.loaded_layers).share for new in (ours, eplb)
            )
            rows.append(
                {
                    "from, to": f"{before.names[0]}, {after.names[0]}",
                    "EP/slots": f"{ranks}/{slots}",
                    "before": f"{score(current, after).imbalance_mean:.3f}",
                    "after": figure(score(ours, after).imbalance_mean, 1.02),
                    "% moved": figure(share, target, 1),
                    "EPLB replanned %": f"{replanned:.0f}",
                }
            )
    return rows


def splits(loads: Loads) -> Rows:
    """`level` against the linear program on over-dispersed batches, and its time."""
    (window, *_) = windows(loads)
    layers = window.loaded_layers
    rows = []
    refined, for_level, lplb = {}, {"split": "level"}, {"algorithm": "lplb"}
    for ranks, slots, name, asked in (
        (32, 288, "refined", refined),
        (32, 288, "refined+level", for_level),
        (32, 288, "lplb", lplb),
        (32, 320, "refined", refined),
        (32, 320, "refined+level", for_level),
        (64, 320, "refined", refined),
        (64, 320, "refined+level", for_level),
    ):
        placement = plan(window, ranks=ranks, slots=slots, **asked)
        for tokens in (1024, 4096):
            batches = draw_batches(window, layers, choices=8 * tokens, batches=2, concentration=CONCENTRATION)
            split, gap, rounding, microseconds = zip(
                *(against_the_program(placement, layers, batches)), strict=True
            )
            rows.append(
                {
                    "EP/slots": f"{ranks}/{slots} {name}",
                    "tokens": tokens,
                    "even": f"{mean_imbalance(placement, layers, batches, 'even'):.4f}",
                    "level": f"{np.mean(split):.4f}",
                    "% over HiGHS, worst": figure(max(gap), 0.2, 3),
                    "rounding, points": figure(float(np.mean(rounding)), 0.5 if tokens == 1024 else None, 3),
                    "us a layer": figure(float(np.mean(microseconds)), 15 if ranks == 32 else None, 1),
                    "slowest us": f"{max(microseconds):.1f}",
                }
            )
    return rows


def against_the_program(
    placement: Placement, layers: tuple[int, ...], batches_YBE: np.ndarray
) -> Iterator[tuple[float, float, float, float]]:
    """For each batch: imbalance, percent over the optimum without and with rounding, microseconds."""
    many = 2**20
    for layer, batches_BE in zip(layers, batches_YBE, strict=True):
        layout = placement.layers[layer]
        for counts_E in batches_BE:
            best = optimum(counts_E, layout)
            whole, fine = (
                rank_costs(level_shares(counts_E * scale, layout)[None], layout).max() / scale
                for scale in (1, many)
            )
            arrays = counts_E, layout.slots_EC, layout.rank_of_slot_P, layout.ranks
            _, ms = timed(lambda: level_kernel(*arrays), 9)  # noqa: B023
            mean = counts_E.sum() / layout.ranks
            yield whole / mean, 100 * (fine / best - 1), 100 * (whole - best) / mean, 1e3 * ms


def drift(loads: Loads) -> Rows:
    """EP32/320 planned on one window, or on the mixture of two, and scored on a window under each split."""
    rows = []
    for first, later in pairwise(windows(loads)):
        both = Loads(np.concatenate([first.tokens_WYE, later.tokens_WYE]), first.names + later.names)
        early, mixed = (plan(given, ranks=32, slots=320) for given in (first, both))
        eplb = plan(first, ranks=32, slots=320, algorithm="eplb")
        shares = [
            w.tokens_WYE[0] / np.maximum(w.tokens_WYE[0].sum(axis=1, keepdims=True), 1)
            for w in (first, later)
        ]
        apart = float(np.abs(shares[0] - shares[1]).sum(axis=1)[list(first.loaded_layers)].mean() / 2)
        near = apart <= 0.12  # total variation up to which there are targets
        rows.append(
            {
                "planned on, scored on": f"{first.names[0]}, {later.names[0]}",
                "distance": f"{apart:.2f}",
                "EPLB, even": f"{score(eplb, later).imbalance_mean:.4f}",
                "ours, even": f"{score(early, later).imbalance_mean:.4f}",
                "ours, level": figure(
                    score(early, later, split="level").imbalance_mean, 1.035 if near else None
                ),
                "mixture, even": figure(score(mixed, both).imbalance_mean, None),
                "mixture, level": figure(
                    score(mixed, both, split="level").imbalance_mean, 1.01 if near else None
                ),
            }
        )
    return rows


def picture(placed: Rows, split: Rows) -> Figure:
    """The loss to imbalance, in percent of the mean: by placement, and batch by batch."""
    canvas = Figure(figsize=(13, 4.5), layout="constrained")
    left, right = canvas.subplots(1, 2)
    sizes = list(dict.fromkeys(row["EP/slots"] for row in placed))
    plain = [[row for row in placed if row["EP/slots"] == size and not row["search ms"]] for size in sizes]
    for offset, column, name, color in ((-0.2, "EPLB mean", "EPLB", PEER), (0.2, "mean", "epbackend", OURS)):
        values = [100 * (np.mean([float(row[column].split()[0]) for row in rows]) - 1) for rows in plain]
        bars = left.bar(np.arange(len(sizes)) + offset, values, 0.38, label=name, color=color)
        left.bar_label(bars, [f"{value:.2f}" for value in values])
    left.set(title="Placement: busiest rank above the mean, mean over layers", ylabel="%")
    left.set_xticks(range(len(sizes)), [f"EP{size}" for size in sizes])
    split = [row for row in split if row["tokens"] == 4096]
    names = ["EP" + row["EP/slots"].replace(" ", "\n") for row in split]
    for offset, column, color in ((-0.2, "even", PEER), (0.2, "level", OURS)):
        values = [100 * (float(row[column]) - 1) for row in split]
        right.bar(np.arange(len(names)) + offset, values, 0.38, label=f"split: {column}", color=color)
    right.set(title="Split: busiest rank above the mean, over-dispersed batches", ylabel="%")
    right.set_xticks(range(len(names)), names, fontsize=8)
    for axes in (left, right):
        axes.legend()
        axes.grid(axis="y", alpha=0.3)
    return canvas


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("loads", nargs="*", help="files of recorded loads")
    files = parser.parse_args().loads
    warm_up()
    torch.set_num_threads(1)
    loads = read_loads(files) if files else synthetic_loads(windows=3)
    tables = {
        "Placement: (ok or MISSED: target)": placements(loads),
        "EP144/288: few slots a rank": budgets(loads),
        "Incremental: to 1.02": moves(loads),
        "Token split, batch by batch": splits(loads),
        "Drift, EP32/320": drift(loads),
    }
    for title, rows in tables.items():
        if rows:
            print_table(title, rows)
    placed, *_, split, _ = tables.values()
    save("placement-recorded" if files else "placement", tables, picture(placed, split))


if __name__ == "__main__":
    main()
