"""What a case should take, from bytes, operations, tiles and occupancy: held against every measurement.

    python -m benchmarks.cuda.model

Three times for each product: its bytes at the speed of the memory; its operations at the speed of the matrix units;
and its tiles, in waves of as many as run at once, at the speed that a tile reaches. The largest of the first and the
last, plus a launch, is the prediction. It knows nothing of clocks, of the L2 cache or of the compiler's schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from benchmarks.cuda.cases import CASES, Case
from epbackend.kernels.triton.permute import MOST_CHOICES
from epbackend.kernels.triton.tiles import H100, Chip, Product, Tile, choose_tile

LAUNCH_US = 2.0
"""Of one kernel in a CUDA graph, its ramp up and down included: an assumption."""


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reached where nothing but memory or matrix units counts."""

    bandwidth: float
    """bytes / s of a copy, read and written."""
    flops: dict[str, float]
    """of a large product, by form."""


H100_CEILINGS = Ceilings(3.0e12, {"half": 798e12, "fp8": 1400e12, "int8": 1400e12})
"""bfloat16 and copy measured on an H100 80GB HBM3 (2026-11-13, torch 2.11); the 8-bit figures are an assumption, 0.7 of
the data sheet's 1979, as DeepGEMM reports for H800."""

TILE_EFFICIENCY = {"half": 0.80, "fp8": 0.62, "int8": 0.70}
MEMORY_EFFICIENCY = 0.9
"""Shares of the ceilings that Triton's inner loop keeps: assumptions, until a run replaces them."""


def predicted_us(case: Case, chip: Chip = H100, ceilings: Ceilings = H100_CEILINGS) -> float:
    """Both products, the schedule, and for quantized forms the pass that quantizes."""
    experts, form = case.experts, case.form
    gated = Product(form, True, case.rows, experts.slots, 2 * experts.F, experts.D)
    plain = Product(form, False, case.rows, experts.slots, experts.D, experts.F)
    total = LAUNCH_US + sum(_product_us(case, each, chip, ceilings) for each in (gated, plain))
    if form != "half":
        total += LAUNCH_US + 3 * case.rows * experts.D / ceilings.bandwidth * 1e6
    return total


def gathering_spares_us(case: Case, ceilings: Ceilings = H100_CEILINGS) -> float:
    """The most that reading the rows where the tokens lie may spare a layer: writing the copy, which reads the tokens.

    It is a launch too where more choices are sorted than one launch takes. What the product loses without the copy
    engine is not in it, and only a GPU tells.
    """
    launch = LAUNCH_US if case.rows > MOST_CHOICES else 0.0
    return launch + 2 * (case.rows + case.tokens) * case.experts.D / ceilings.bandwidth * 1e6


def floors_us(case: Case, ceilings: Ceilings = H100_CEILINGS) -> tuple[float, float]:
    """(memory, compute): no kernel is faster than the larger one."""
    return case.bytes / ceilings.bandwidth * 1e6, case.flops / ceilings.flops[case.form] * 1e6


def tiles_of(case: Case, product: Product, tile: Tile) -> int:
    """Tiles of all slots together."""
    columns = product.height // 2 if product.gated else product.height
    return sum(ceil(rows / tile.rows) for rows in case.counts_L.tolist()) * ceil(columns / tile.columns)


def _product_us(case: Case, product: Product, chip: Chip, ceilings: Ceilings) -> float:
    tile = choose_tile(chip, product)
    at_once = chip.sms * tile.programs
    waves = ceil(tiles_of(case, product, tile) / at_once)
    tile_flops = 2 * tile.rows * tile.columns * product.depth * (2 if product.gated else 1)
    speed = ceilings.flops[case.form] * TILE_EFFICIENCY[case.form]
    compute_us = waves * at_once * tile_flops / speed * 1e6
    width = 1 if case.form != "half" else 2
    used = int((case.counts_L > 0).sum())
    out_columns = product.height // 2 if product.gated else product.height
    moved = (
        width * (used * product.height * product.depth + case.rows * product.depth)
        + 2 * case.rows * out_columns
    )
    return LAUNCH_US + max(compute_us, moved / (ceilings.bandwidth * MEMORY_EFFICIENCY) * 1e6)


def main() -> None:
    print(f"predicted for {H100.name}; nothing below is measured")
    print(
        f"{'case':40}{'memory us':>11}{'compute us':>11}{'predicted us':>13}{'TFLOP/s':>9}{'TB/s':>7}"
        f"{'no copy us':>12}  target"
    )
    for case in CASES:
        memory, compute = floors_us(case)
        us = predicted_us(case)
        target = f">= {case.target_tflops:.0f} TFLOP/s" if case.target_tflops else ""
        target = f"<= {case.target_us:.0f} us" if case.target_us else target
        rates = f"{case.flops / us / 1e6:9.0f}{case.bytes / us / 1e6:7.2f}"
        spared = f"{-gathering_spares_us(case):12.1f}"
        print(f"{case.name:40}{memory:11.1f}{compute:11.1f}{us:13.1f}{rates}{spared}  {target}")


if __name__ == "__main__":
    main()
