"""Find the best tile of each product on the GPU at hand: `epbackend tune`.

Candidates are compiled on all cores, those of later products while earlier ones are timed; those that spill or do not
fit are dropped there. Each result is compared with that of the tile in use before it is timed. Times are those of calls
captured in a CUDA graph, the median of many replays; candidates take turns, since a GPU's clock is not steady.

The first product in half precision can read its rows where the tokens lie, or from a copy (`Tile.gather`). So it is
timed with the sort before it, which copies or does not.

In order: timing, the case (one product with its data), the candidates, the search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from epbackend.kernels.triton.permute import permute
from epbackend.kernels.triton.quantize import quantize_fp8, quantize_int8
from epbackend.kernels.triton.tiles import (
    SPECIALIZED_ROWS,
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

REPLAYS, TURNS = 8, 3


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one of `calls`, which do the same work on different data, so that no cache holds it.

    All replays are queued before the first is waited for, so that none includes the host's time to launch it.
    """
    for call in calls:  # compiles, and lets the peers' own tuning run, which a capture would forbid
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for start, end in spans:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) * 1e3 / len(calls) for start, end in spans)


BYTES = {"half": 2, "fp8": 1, "int8": 1}
"""Of a value, by weight format."""

LARGEST_ERROR = {"half": 0.01, "int8": 0.03, "fp8": 0.06}
"""Of a right answer, as a share of the reference's norm: the error of rounding rows to so few bits."""

LARGEST_MEAN = 2048
"""Rows a slot with which the table's last entry, which has no upper end, is timed."""

MOST_SPILLED = 128
"""Bytes a thread: a few registers spilled outside of the loop cost less than a smaller tile would."""


@dataclass(frozen=True)
class ExpertShape:
    """The routed experts that one GPU holds: gate_up [slots, 2F, D] and down [slots, D, F]."""

    name: str
    slots: int
    D: int
    F: int
    top_k: int = 1
    """Choices of a token that fall on this GPU, about."""

    def weights(self, weight_format: str, device: torch.device) -> tuple[Experts, Experts]:
        """(gate_up, down), random, in a weight format."""
        gate_up = random_experts(weight_format, self.slots, 2 * self.F, self.D, device)
        return gate_up, random_experts(weight_format, self.slots, self.D, self.F, device)


def random_experts(weight_format: str, slots: int, columns: int, depth: int, device: torch.device) -> Experts:
    """[slots, columns, depth], scaled so that products with rows of standard deviation 1 have about that too."""
    if weight_format == "half":
        return torch.randn(slots, columns, depth, device=device, dtype=torch.bfloat16) / depth**0.5
    if weight_format == "int8":
        values = torch.randint(-127, 128, (slots, columns, depth), device=device, dtype=torch.int8)
        return Int8Weights(
            values, torch.full((slots, columns), 1 / (73 * depth**0.5), dtype=torch.float32, device=device)
        )
    values = torch.empty(slots, columns, depth, dtype=FP8, device=device)
    for slot in range(slots):
        values[slot] = torch.randn(columns, depth, dtype=torch.float32, device=device).to(FP8)
    scales = torch.rand(slots, columns // BLOCK, depth // BLOCK, dtype=torch.float32, device=device)
    scales /= depth**0.5
    return Fp8Blocks(values, scales)


@dataclass(frozen=True)
class Data:
    """The arguments of one product."""

    rows: Any
    """rows_SK, quantized as the experts are; or hidden_TD, with `slot_ids_TK`."""
    experts: Any
    counts_L: Tensor
    slot_ids_TK: Tensor | None = None
    """Of a first product that is timed with the sort."""


@dataclass(frozen=True)
class TuningCase:
    """One product at one mean number of rows a slot."""

    experts: ExpertShape
    weight_format: str
    gated: bool
    up_to: float | None
    """Which entry of the table's list the result is for: the one up to so many rows a slot, None for the last."""

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        return f"{self.experts.name} {self.weight_format} {kind} {self.rows_per_slot:g} rows a slot"

    @property
    def rows_per_slot(self) -> float:
        return self.up_to or LARGEST_MEAN

    @property
    def rows(self) -> int:
        return max(1, int(self.experts.slots * self.rows_per_slot))

    @property
    def product(self) -> Product:
        experts = self.experts
        height, depth = (2 * experts.F, experts.D) if self.gated else (experts.D, experts.F)
        return Product(self.weight_format, self.gated, self.rows, experts.slots, height, depth)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.product.height * self.product.depth

    @property
    def bytes(self) -> float:
        """Read: the weights, and the rows that come in."""
        product = self.product
        return BYTES[self.weight_format] * product.depth * (product.slots * product.height + product.rows)

    def draw(self, device: torch.device) -> Data:
        """Random data; on "meta" the shapes alone."""
        product, experts = self.product, self.experts
        packed = experts.weights(self.weight_format, device)[0 if self.gated else 1]
        if self.weight_format == "half" and self.gated:
            tokens = max(1, product.rows // experts.top_k)
            ids_TK = (
                torch.rand(tokens, product.slots, dtype=torch.float32, device=device)
                .topk(experts.top_k)
                .indices
            )
            counts_L = torch.empty(product.slots, dtype=torch.int64, device=device)  # the sort counts
            hidden_TD = torch.randn(tokens, product.depth, dtype=torch.bfloat16, device=device)
            return Data(hidden_TD, packed, counts_L, ids_TK)
        rows_SK = torch.randn(product.rows, product.depth, dtype=torch.bfloat16, device=device)
        slot_S = torch.randint(product.slots, (product.rows,), dtype=torch.int64, device=device)
        counts_L = torch.zeros(product.slots, dtype=torch.int64, device=device)
        counts_L.scatter_add_(0, slot_S, torch.ones_like(slot_S))
        schedule = row_tiles(counts_L, product.rows, 128)
        quantize = {"half": lambda rows, _: rows, "fp8": quantize_fp8, "int8": quantize_int8}[
            self.weight_format
        ]
        return Data(quantize(rows_SK, schedule), packed, counts_L)

    def run(self, data: Data, tile: Tile, chip: Chip | None = None) -> Tensor:
        """The sort where it is timed, the schedule and the product."""
        chip = chip or chip_of(data.counts_L.device)
        rows, counts_L, count = data.rows, data.counts_L, self.rows
        if data.slot_ids_TK is not None:
            permuted = permute(rows, data.slot_ids_TK, self.experts.slots, copy=not tile.gather)
            rows, counts_L, count = permuted.rows_SD, permuted.counts_L, data.slot_ids_TK.numel()
        schedule = row_tiles(counts_L, count, tile.rows)
        out = grouped_matmul(rows, data.experts, schedule, tile, chip, gated=self.gated, dtype=torch.bfloat16)
        return out if isinstance(out, Tensor) else out.values_SK


def compile_candidate(case: TuningCase, chip: Chip, tile: Tile) -> bool:
    """Compile one candidate into Triton's cache; whether it can be used."""
    try:
        with compiling_for(chip) as compiled:
            case.run(case.draw(torch.device("meta")), tile, chip)
        found = resources(compiled[-1])
    except Exception:  # the compiler may refuse a candidate for any reason; there are others
        return False
    fits = found.shared_bytes <= chip.shared_bytes and found.spilled <= MOST_SPILLED
    return fits and found.programs_per_sm(chip) >= tile.programs


FEWEST_SUMS, MOST_SUMS = 32, 128
"""Accumulators of a thread: with fewer the matrix units wait for data, with more the registers spill."""


def candidates(case: TuningCase, in_use: Tile, chip: Chip) -> list[Tile]:
    """The tile in use first; then those whose blocks fit the shared memory."""
    weight_format, gated, rows = case.weight_format, case.gated, case.rows_per_slot
    found: list[Tile] = []
    if rows <= MEMORY_BOUND:
        found += memory_bound(weight_format, gated, (16, 32) if rows > FEW_ROWS else (16,))
    if rows > FEW_ROWS:
        found += compute_bound(weight_format, gated, (64,) if rows <= MEMORY_BOUND else (64, 128), chip)
    fitting = [
        tile
        for tile in found
        if tile.programs * shared_bytes(tile, weight_format, gated, chip) <= chip.shared_bytes
    ]
    if weight_format == "half" and gated:
        fitting += [replace(tile, gather=True) for tile in [in_use, *fitting] if not tile.specialize]
    return list(dict.fromkeys([in_use, *fitting]))


FEW_ROWS, MEMORY_BOUND = 8, 32
"""Rows a slot: up to the first number, tiles of 16 rows hardly ever leave rows of a slot to a second tile, which would
load the slot's weights again; up to the second, loading the weights takes longest whatever the tile."""


def memory_bound(weight_format: str, gated: bool, rows: tuple[int, ...]) -> list[Tile]:
    """For few rows, where the bytes in flight count, and how evenly the tiles divide among the programs."""
    columns = (128,) if weight_format == "fp8" and gated else (32, 64, 128)
    depths = (128,) if weight_format == "fp8" else (128, 256)
    return [
        Tile(each, width, depth, warps, stages, band=1, programs=programs, flatten=flatten)
        for each, width, depth, warps, stages, programs, flatten in product(
            rows, columns, depths, (4, 8), (3, 4, 5), (1, 2, 3, 4), (False, True)
        )
        if warps == 4 or width == 128
    ]


def compute_bound(weight_format: str, gated: bool, rows: tuple[int, ...], chip: Chip) -> list[Tile]:
    """For many rows: large tiles, one or two programs on a multiprocessor, some with a warp that only loads."""
    depth = 64 if weight_format == "half" else 128
    sizes = [(each, columns, depth) for each, columns in product(rows, _columns(weight_format, gated))]
    pipelined = [
        Tile(*size, warps, stages, band=band, programs=programs, flatten=flatten)
        for size, warps, stages, band, programs, flatten in product(
            sizes, (4, 8), (3, 4), (8, 16), (1, 2), (False, True)
        )
    ]
    specialized = [specialized_tile(weight_format, gated, band) for band in (4, 8, 16) if chip.specializes]
    return [tile for tile in pipelined if _registers_fit(tile, gated)] + specialized


def specialized_tile(weight_format: str, gated: bool, band: int = 8) -> Tile:
    """The tile of `specialized_matmul`: blocks of 128 bytes of a row, four of them under way."""
    depth = 128 // BYTES[weight_format]
    return Tile(SPECIALIZED_ROWS, 128 if gated else 256, depth, warps=8, stages=4, band=band, specialize=True)


def _columns(weight_format: str, gated: bool) -> tuple[int, ...]:
    if weight_format == "fp8":
        return (128,) if gated else (64, 128)
    return (64, 128) if gated else (128, 256)


def _registers_fit(tile: Tile, gated: bool) -> bool:
    """Whether each thread has enough accumulators, and not too many for the programs that share the registers."""
    sums = tile.rows * tile.columns * (2 if gated else 1) // (32 * tile.warps)
    return FEWEST_SUMS <= sums <= MOST_SUMS and sums * tile.warps * tile.programs <= 8 * MOST_SUMS


WGMMA_ROWS = 64
"""The least for which Hopper's matrix units read blocks from shared memory."""


def shared_bytes(tile: Tile, weight_format: str, gated: bool, chip: Chip) -> int:
    """The blocks in flight; where they pass through registers, the one that is multiplied is there."""
    columns = tile.columns * (2 if gated else 1)
    in_place = chip.capability[0] in (9, 10) and tile.rows >= WGMMA_ROWS
    blocks = tile.stages if in_place else tile.stages - 1
    return (tile.rows + columns) * tile.depth * BYTES[weight_format] * blocks


Clock = Callable[[Sequence[Callable[[], object]]], float]
"""Microseconds of one of some calls that do the same."""

IN_A_ROW = 8
"""Calls that are timed together where the rows are few: one is too short to time."""


@dataclass(frozen=True)
class TuningResult:
    """The times of one product's candidates."""

    case: TuningCase
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
        best_us, case = self.us[self.best], self.case
        return (
            f"{case}: {self.us[self.in_use]:.1f} us -> {best_us:.1f} us ({case.flops / best_us / 1e6:.0f} TFLOP/s, "
            f"{case.bytes / best_us / 1e6:.2f} TB/s), best of {len(self.us)} that work, {self.tried} tried"
        )


def tuning_cases(shape: ExpertShape, weight_format: str, chip: Chip) -> list[TuningCase]:
    """Both products, at the row counts where the family's table changes tiles."""
    return [
        TuningCase(shape, weight_format, gated, up_to)
        for gated in (True, False)
        for up_to in dict.fromkeys(entry["up_to"] for entry in family_tiles(chip, weight_format, gated))
    ]


Choose = Callable[[TuningCase, Tile, Chip], list[Tile]]
"""The tiles to try for a case, the one in use first."""


def tune(
    wanted: Iterable[TuningCase], chip: Chip, table: Path | None, choose: Choose = candidates
) -> Iterator[TuningResult]:
    """The result of each case in turn; by then its best tile is written to `table`, if one is named."""
    with _compilers() as pool:
        compiles = Compiles(pool, chip)
        searches = []
        for case in wanted:
            in_use = choose_tile(chip, case.product)
            tiles = choose(case, in_use, chip)
            searches.append((case, in_use, {tile: compiles.begun(case, tile) for tile in tiles}))
        for case, in_use, usable in searches:
            others = [tile for tile, compiled in usable.items() if tile != in_use and compiled.result()]
            with torch.inference_mode():
                result = time_tiles(case, in_use, others, len(usable), torch.device("cuda"), time_us)
            if table:  # at once: a kernel that hangs or breaks the GPU must not cost what is known by then
                record(
                    table, tuned_for(chip, case.product, case.up_to), result.best, date.today().isoformat()
                )
            torch.cuda.empty_cache()
            yield result


class Compiles:
    """Compiles candidates in other processes. The number of rows makes no other kernel."""

    def __init__(self, pool: ProcessPoolExecutor, chip: Chip) -> None:
        self._pool, self._chip = pool, chip
        self._begun: dict[tuple[Product, Tile], Future[bool]] = {}

    def begun(self, case: TuningCase, tile: Tile) -> Future[bool]:
        """Of `compile_candidate`."""
        kernel = replace(case.product, rows=0), tile
        if kernel not in self._begun:
            self._begun[kernel] = self._pool.submit(compile_candidate, case, self._chip, tile)
        return self._begun[kernel]


def time_tiles(
    case: TuningCase, in_use: Tile, others: list[Tile], tried: int, device: torch.device, clock: Clock
) -> TuningResult:
    """Time the tile in use, and the others that give the same answer."""
    data = case.draw(device)
    expected = case.run(data, in_use).float()
    times: dict[Tile, list[float]] = {in_use: []}
    dropped = []
    for tile in others:
        try:
            error = float((case.run(data, tile).float() - expected).norm() / expected.norm())
            if error <= LARGEST_ERROR[case.weight_format]:
                times[tile] = []
            else:
                dropped.append(f"wrong by {error:.3f}: {tile}")
        except (RuntimeError, triton.TritonError) as failure:
            dropped.append(f"{str(failure).partition(chr(10))[0]}: {tile}")
    for _, tile in product(range(TURNS), times):
        times[tile].append(_time(case, data, tile, clock))
    us = {tile: median(each) for tile, each in times.items()}
    return TuningResult(case, in_use, us, tried, tuple(dropped))


def _time(case: TuningCase, data: Data, tile: Tile, clock: Clock) -> float:
    return clock([partial(case.run, data, tile)] * (IN_A_ROW if case.rows_per_slot <= MEMORY_BOUND else 1))


@contextmanager
def _compilers() -> Iterator[ProcessPoolExecutor]:
    """A process for each core, without stderr: compilers write much about candidates that do not work."""
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_quiet)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _quiet() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
