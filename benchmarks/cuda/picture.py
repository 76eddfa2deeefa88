"""The roofline of a run: each figure over its case's arithmetic intensity, under the ceilings measured with it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARKS = {
    "epbackend": "o",
    "epbackend, layer": "s",
    "torch._grouped_mm": "^",
    "cuBLAS loop": "v",
    "LMDeploy, layer": "D",
}


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], file: Path) -> None:
    """Write the picture, or say that matplotlib is missing."""
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    bandwidth, peak = machine["memory_tb_per_s"], machine["bfloat16_tflops"]
    intensities = [2.0**n for n in range(-1, 13)]
    axes.loglog(intensities, [min(peak, bandwidth * each) for each in intensities], color="black", lw=1)
    for by, mark in MARKS.items():
        mine = [row for row in rows if row["by"] == by and "us" in row]
        if mine:
            intensity = [row["tflops"] / row["tb_per_s"] for row in mine]
            axes.loglog(intensity, [row["tflops"] for row in mine], mark, label=by, alpha=0.7)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(
        f"{machine['gpu']}, {machine['date']}; ceilings: memory, and bfloat16 product of 8192 cubed"
    )
    axes.legend()
    figure.savefig(file, dpi=130)
    print(f"written: {file}")
