"""Find the best tile of each product on the GPU at hand: `epbackend tune`.

`candidates.py` says which tiles are worth a try, `job.py` what is run with them, `search.py` tries them all.

Time on a GPU: calls captured in a CUDA graph, each with other data, the median of many replays.

One product to be tuned: its data, and the launch of it with any tile.

Which tiles are worth timing for a product.

Time every candidate tile of every product on the GPU at hand, and keep the best.

Candidates are compiled first, on all cores; those that spill or do not fit are dropped there. Each result is compared
with that of the tile in use before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from epbackend.kernels.fp8 import BLOCK, FP8, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.compile_info import compiling_for, resources
from epbackend.kernels.triton.grouped_matmul import grouped_matmul
from epbackend.kernels.triton.quantize import quantize_fp8, quantize_int8
from epbackend.kernels.triton.tiles import (
    Chip,
    Product,
    Tile,
    chip_of,
    choose_tile,
    family_tiles,
    record,
    row_tiles,
    tuned_for,
)
from epbackend.kernels.weight_formats import Experts

REPLAYS = 20


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one of `calls`, which do the same work on different data, so that no cache holds it."""
    for call in calls:  # compiles, and lets the peers' own tuning run, which a capture would forbid
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)


BYTES = {"half": 2, "fp8": 1, "int8": 1}
"""Of a value, by form."""

LARGEST_ERROR = {"half": 0.01, "int8": 0.03, "fp8": 0.06}
"""Of a right answer, as a share of the reference's norm: what rounding rows to so few bits leaves."""

LARGEST_MEAN = 1024
"""Rows a slot that stand for all larger numbers."""

MOST_SPILLED = 128
"""Bytes a thread: a few registers that wait outside of the loop cost less than a smaller tile would."""


@dataclass(frozen=True)
class ExpertShape:
    """The routed experts that one GPU holds: gate_up [slots, 2F, D] and down [slots, D, F]."""

    name: str
    slots: int
    D: int
    F: int

    def weights(self, form: str, device: torch.device) -> tuple[Experts, Experts]:
        """(gate_up, down), random, packed in `form`."""
        gate_up = random_experts(form, self.slots, 2 * self.F, self.D, device)
        return gate_up, random_experts(form, self.slots, self.D, self.F, device)


def random_experts(form: str, slots: int, columns: int, depth: int, device: torch.device) -> Experts:
    """[slots, columns, depth], so that products of rows of ones' size have about that size too."""
    if form == "half":
        return torch.randn(slots, columns, depth, device=device, dtype=torch.bfloat16) / depth**0.5
    if form == "int8":
        values = torch.randint(-127, 128, (slots, columns, depth), device=device, dtype=torch.int8)
        return Int8Weights(values, torch.full((slots, columns), 1 / (73 * depth**0.5), device=device))
    values = torch.empty(slots, columns, depth, dtype=FP8, device=device)
    for slot in range(slots):
        values[slot] = torch.randn(columns, depth, device=device).to(FP8)
    scales = torch.rand(slots, columns // BLOCK, depth // BLOCK, device=device) / depth**0.5
    return Fp8Blocks(values, scales)


@dataclass(frozen=True)
class Data:
    """Rows as the kernel takes them, quantized or not; the experts; counts_L."""

    rows: Any
    experts: Any
    counts_L: Tensor


@dataclass(frozen=True)
class Job:
    """One product at one mean number of rows a slot."""

    experts: ExpertShape
    form: str
    gated: bool
    up_to: float | None
    """The entry of the table's list that the result is for."""

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        return f"{self.experts.name} {self.form} {kind} {self.rows / self.experts.slots:g} rows a slot"

    @property
    def rows(self) -> int:
        return int(self.experts.slots * (self.up_to or LARGEST_MEAN))

    @property
    def product(self) -> Product:
        experts = self.experts
        height, depth = (2 * experts.F, experts.D) if self.gated else (experts.D, experts.F)
        return Product(self.form, self.gated, self.rows, experts.slots, height, depth)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.product.height * self.product.depth

    @property
    def bytes(self) -> float:
        """The weights, and the rows that come in."""
        product = self.product
        return BYTES[self.form] * product.depth * (product.slots * product.height + product.rows)

    def draw(self, device: torch.device) -> Data:
        """Random data; on "meta" the shapes alone."""
        product = self.product
        rows_SK = torch.randn(product.rows, product.depth, dtype=torch.bfloat16, device=device)
        slot_S = torch.randint(product.slots, (product.rows,), device=device)
        counts_L = torch.zeros(product.slots, dtype=torch.int64, device=device)
        counts_L.scatter_add_(0, slot_S, torch.ones_like(slot_S))
        schedule = row_tiles(counts_L, product.rows, 128)
        quantize = {"half": lambda rows, _: rows, "fp8": quantize_fp8, "int8": quantize_int8}[self.form]
        experts = self.experts.weights(self.form, device)[0 if self.gated else 1]
        return Data(quantize(rows_SK, schedule), experts, counts_L)

    def run(self, data: Data, tile: Tile, chip: Chip | None = None) -> Tensor:
        """The schedule and the product."""
        chip = chip or chip_of(data.counts_L.device)
        schedule = row_tiles(data.counts_L, self.rows, tile.rows)
        out = grouped_matmul(
            data.rows, data.experts, schedule, tile, chip, gated=self.gated, dtype=torch.bfloat16
        )
        return out if isinstance(out, Tensor) else out.values_SK


def compile_job(job: Job, chip: Chip, tile: Tile) -> bool:
    """Compile one candidate into Triton's cache; whether it can be used."""
    try:
        with compiling_for(chip) as compiled:
            job.run(job.draw(torch.device("meta")), tile, chip)
        found = resources(compiled[-1])
    except Exception:  # whatever the compiler does not like about a candidate, there are others
        return False
    fits = found.shared_bytes <= chip.shared_bytes and found.spilled <= MOST_SPILLED
    return fits and found.programs_per_sm(chip) >= tile.programs


FEWEST_SUMS, MOST_SUMS = 32, 128
"""Accumulators of a thread: with fewer the matrix units wait for data, with more registers run out."""


def candidates(form: str, gated: bool, family: Tile, chip: Chip) -> list[Tile]:
    """The family's own tile first; then those whose blocks fit the shared memory."""
    found = memory_bound(form, gated) if family.rows <= 16 else compute_bound(form, gated, family.rows, chip)
    fitting = [tile for tile in found if _shared_bytes(tile, form, gated) <= chip.shared_bytes]
    return list(dict.fromkeys([family, *fitting]))


def memory_bound(form: str, gated: bool) -> list[Tile]:
    """Few rows: what counts is how many bytes are under way, and how evenly the tiles fall on the chip."""
    columns = (128,) if form == "fp8" and gated else (32, 64, 128)
    depths = (128,) if form == "fp8" else (128, 256)
    return [
        Tile(16, each, depth, warps, stages, band=1, programs=programs, flatten=flatten)
        for each, depth, warps, stages, programs, flatten in product(
            columns, depths, (4, 8), (3, 4, 5), (1, 2, 3, 4), (False, True)
        )
        if warps == 4 or each == 128
    ]


def compute_bound(form: str, gated: bool, rows: int, chip: Chip) -> list[Tile]:
    """Many rows: large tiles, one or two programs on a multiprocessor, warps that load beside warps that multiply."""
    sizes = [
        (each, columns, 64 if form == "half" else 128)
        for each, columns in product((64, 128) if rows >= 128 else (32, 64), _columns(form, gated))
    ]
    pipelined = [
        Tile(*size, warps, stages, band=band, programs=programs, flatten=flatten)
        for size, warps, stages, band, programs, flatten in product(
            sizes, (4, 8), (3, 4), (8, 16), (1, 2), (False, True)
        )
    ]
    specialized = [
        Tile(*size, 4, stages, band=band, specialize=True)
        for size, stages, band in product(sizes, (2, 3, 4), (8, 16))
        if chip.capability[0] == 9 and size[0] >= 64
    ]
    return [tile for tile in pipelined if _registers_fit(tile, gated)] + specialized


def _columns(form: str, gated: bool) -> tuple[int, ...]:
    if form == "fp8":
        return (128,) if gated else (64, 128)
    return (64, 128) if gated else (128, 256)


def _registers_fit(tile: Tile, gated: bool) -> bool:
    """Whether the sums of a thread are neither too few nor too many for the programs that share the registers."""
    sums = tile.rows * tile.columns * (2 if gated else 1) // (32 * tile.warps)
    return FEWEST_SUMS <= sums <= MOST_SUMS and sums * tile.warps * tile.programs <= 8 * MOST_SUMS


def _shared_bytes(tile: Tile, form: str, gated: bool) -> int:
    """Of all programs on a multiprocessor: the blocks under way."""
    columns = tile.columns * (2 if gated else 1)
    return (tile.rows + columns) * tile.depth * BYTES[form] * tile.stages * tile.programs


Clock = Callable[[Sequence[Callable[[], object]]], float]
"""Microseconds of one of some calls that do the same."""

FEW_ROWS = 16
"""Tiles with as few rows are timed several times in a row: alone they are too short to time."""


@dataclass(frozen=True)
class Finding:
    """What one product's candidates came to."""

    job: Job
    in_use: Tile
    us: dict[Tile, float]
    """Of each candidate that gives the right answer."""
    tried: int
    dropped: tuple[str, ...]
    """What failed or was wrong on the GPU, and how."""

    @property
    def best(self) -> Tile:
        return min(self.us, key=self.us.__getitem__)

    def __str__(self) -> str:
        best_us, job = self.us[self.best], self.job
        return (
            f"{job}: {self.us[self.in_use]:.1f} us -> {best_us:.1f} us ({job.flops / best_us / 1e6:.0f} TFLOP/s, "
            f"{job.bytes / best_us / 1e6:.2f} TB/s), best of {len(self.us)} that work, {self.tried} tried"
        )


def jobs(shape: ExpertShape, form: str, chip: Chip) -> list[Job]:
    """Both products, at the row counts where the family's table changes tiles."""
    return [
        Job(shape, form, gated, entry["up_to"])
        for gated in (True, False)
        for entry in family_tiles(chip, form, gated)
    ]


def tune(
    wanted: Iterable[Job], chip: Chip, table: Path | None, *, specialize: bool = True
) -> Iterator[Finding]:
    """The finding of each job in turn; the best tile is in `table` by then, if there is one."""
    with _compilers() as pool:
        for job in wanted:
            with torch.inference_mode():
                finding = search(job, chip, pool, specialize=specialize)
            if table:  # at once: a kernel that hangs or breaks the GPU must not cost what is known by then
                record(table, tuned_for(chip, job.product, job.up_to), finding.best, date.today().isoformat())
            torch.cuda.empty_cache()
            yield finding


def search(job: Job, chip: Chip, pool: ProcessPoolExecutor, *, specialize: bool) -> Finding:
    """Compile all candidates, then time them."""
    in_use = choose_tile(chip, job.product)
    tiles = [
        tile for tile in candidates(job.form, job.gated, in_use, chip) if specialize or not tile.specialize
    ]
    compiles = pool.map(partial(compile_job, job, chip), tiles)
    usable = [tile for tile, ok in zip(tiles, compiles, strict=True) if ok and tile != in_use]
    return time_tiles(job, in_use, usable, len(tiles), torch.device("cuda"), time_us)


def time_tiles(
    job: Job, in_use: Tile, others: list[Tile], tried: int, device: torch.device, clock: Clock
) -> Finding:
    """Time the tile in use and the others, in so far as these give the same answer."""
    data = job.draw(device)
    expected = job.run(data, in_use).float()
    us = {in_use: _time(job, data, in_use, clock)}
    dropped = []
    for tile in others:
        try:
            error = float((job.run(data, tile).float() - expected).norm() / expected.norm())
            if error <= LARGEST_ERROR[job.form]:
                us[tile] = _time(job, data, tile, clock)
            else:
                dropped.append(f"wrong by {error:.3f}: {tile}")
        except (RuntimeError, triton.TritonError) as failure:
            dropped.append(f"{str(failure).partition(chr(10))[0]}: {tile}")
    return Finding(job, in_use, us, tried, tuple(dropped))


def _time(job: Job, data: Data, tile: Tile, clock: Clock) -> float:
    return clock([partial(job.run, data, tile)] * (8 if tile.rows <= FEW_ROWS else 1))


@contextmanager
def _compilers() -> Iterator[ProcessPoolExecutor]:
    """A process for each core; compilers of candidates that do not work say so at length on stderr."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_quiet) as pool:
        yield pool


def _quiet() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
