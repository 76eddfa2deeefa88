"""Time every candidate tile of every product on the GPU at hand, and keep the best.

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
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from epbackend.kernels.triton.chip import Chip
from epbackend.kernels.triton.tile import Tile
from epbackend.kernels.triton.tiles import choose_tile, family_tiles, record, tuned_for
from epbackend.kernels.triton.tuning.candidates import candidates
from epbackend.kernels.triton.tuning.job import LARGEST_ERROR, Data, ExpertShape, Job, compile_job
from epbackend.kernels.triton.tuning.timing import time_us

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
