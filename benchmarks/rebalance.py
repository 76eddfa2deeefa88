"""Balance while serving beside EPLB: what moves a cycle, what a step costs, how long planning takes.

`python -m benchmarks.rebalance [LOADS ...]`: loads of DeepSeek-V3 in their order, synthetic ones without files, and
synthetic ones of Kimi-K2. Bytes and slots are counted, times of steps computed (`epbackend.balance.cost`), planning is
measured on one thread. Results go to `rebalance`, those on files to `rebalance-recorded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import OURS, PEER, command_line, figure, print_table, save
from epbackend.balance.cost import H100, MODELS, CostModel
from epbackend.balance.simulation import Simulation, sequence, simulate
from epbackend.placement import Loads, read_loads, synthetic_loads
from epbackend.placement.warmup import warm_up

SIZES = {  # model: ranks, slots
    "deepseek-v3": ((32, 288), (64, 320), (144, 288), (320, 320), (320, 640), (768, 768)),
    "kimi-k2": ((384, 384), (384, 768), (768, 768)),
}
CYCLES = (1, 4)
"""From each window to the next: a jump, and a load that goes over."""
SHARES = {32: 15.0, 64: 25.0}
"""Targets by ranks: percent of the slots that move in any cycle."""
PLANNING_MS = {320: 1.0, 768: 3.0}
"""Targets by ranks, with as many slots."""

Rows = list[dict[str, Any]]


def simulations(loads: dict[str, Loads]) -> Iterator[tuple[int, Simulation]]:
    """Each size, by each number of cycles."""
    for model, sizes in SIZES.items():
        for ranks, slots in sizes:
            for cycles in CYCLES:
                cost = CostModel(MODELS[model], H100, ranks, node_size=8, tokens=128)
                yield cycles, simulate(sequence(loads[model], cycles), cost, slots=slots)


def row(cycles: int, found: Simulation) -> dict[str, Any]:
    """One line of the table."""
    facts, step_time = found.to_dict(), found.to_dict()["step_time"]
    ranks, slots = facts["ranks"], facts["slots"]
    most = max(cycle.moved for cycle in found.outcomes["ours"].cycles) / (slots * found.layers)
    planned = PLANNING_MS.get(ranks) if slots == ranks else None
    return {
        "model": facts["model"],
        "EP/slots": f"{ranks}/{slots}",
        "cycles": facts["cycles"],
        "going over in": cycles,
        **{f"ms {name}": f"{step_time[name]:.2f}" for name in ("none", "once", "anew", "ours")},
        "imbalance anew, ours": "{anew:.3f}, {ours:.3f}".format(**facts["imbalance"]),
        "% moved: anew": f"{100 * facts['slots_moved_share']['anew']:.1f}",
        "ours": f"{100 * facts['slots_moved_share']['ours']:.1f}",
        "ours, worst": figure(100 * most, SHARES.get(ranks), 2),
        "GB: anew": f"{facts['bytes_moved']['anew'] / facts['cycles'] / 1e9:.1f}",
        "GB: ours": f"{facts['bytes_moved']['ours'] / facts['cycles'] / 1e9:.1f}",
        "ms: anew waits, ours delays": f"{facts['stall_ms']['anew']:.0f}, {facts['delay_ms']['ours']:.0f}",
        "planning ms a layer": figure(facts["planning_ms_per_layer"], planned, 2),
        "worst": f"{facts['planning_ms_per_layer_worst']:.2f}",
    }


def picture(rows: Rows) -> Figure:
    """Percent of the slots that move a cycle, and the experts' time of a step over EPLB's anew."""
    canvas = Figure(figsize=(13, 4.5), layout="constrained")
    left, right = canvas.subplots(1, 2)
    rows = [row for row in rows if row["going over in"] == CYCLES[-1]]
    places = np.arange(len(rows))
    for offset, column, name, color in (
        (-0.2, "% moved: anew", "EPLB anew", PEER),
        (0.2, "ours", "epbackend", OURS),
    ):
        bars = left.bar(places + offset, [float(row[column]) for row in rows], 0.38, label=name, color=color)
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set(title="Slots that move a cycle", ylabel="%")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=2, frameon=False)
    slower = [100 * (float(row["ms ours"]) / float(row["ms anew"]) - 1) for row in rows]
    right.bar_label(right.bar(places, slower, 0.5, color=OURS), fmt="%.2f", fontsize=8)
    right.axhline(0, color="0.4", linewidth=0.8)
    right.set(title="Experts' time of a step, over that of EPLB anew", ylabel="%")
    for axes in (left, right):
        names = [f"{row['model'].replace('-', chr(10))}\n{row['EP/slots']}" for row in rows]
        axes.set_xticks(places, names, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    return canvas


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("loads", nargs="*", help="files of DeepSeek-V3's recorded loads")
    files = parser.parse_args().loads
    warm_up()
    kimi = MODELS["kimi-k2"]
    loads = {
        "deepseek-v3": read_loads(files) if files else synthetic_loads(61, dense_layers=3, windows=4),
        "kimi-k2": synthetic_loads(kimi.layers, kimi.experts, dense_layers=kimi.dense_layers, windows=4),
    }
    rows = [row(cycles, found) for cycles, found in simulations(loads)]
    title = "Balance while serving, a mean cycle: (ok or MISSED: target)"
    print_table(title, rows)
    save("rebalance-recorded" if files else "rebalance", {title: rows}, picture(rows))


if __name__ == "__main__":
    main()
