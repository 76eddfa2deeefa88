"""Time every candidate tile of every product on the GPU at hand, and keep the best.

    python -m benchmarks.cuda.tune [--only WORDS] [--write] [--no-specialize]

Candidates are compiled first, on all cores; those that spill or do not fit are dropped there. Each result is compared
with that of the family's tile before it is timed. `--write` puts the best tiles into tiles.json.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from multiprocessing import get_context

import torch
import triton

from benchmarks.cuda.candidates import candidates
from benchmarks.cuda.cases import DEEPSEEK, LARGEST_ERROR, QWEN3
from benchmarks.cuda.job import Job, compile_job
from benchmarks.cuda.timing import time_us
from epbackend.kernels.triton.chip import Chip, chip_of
from epbackend.kernels.triton.tile import Tile
from epbackend.kernels.triton.tiles import choose_tile, family_tiles, record, tuned_for

MODELS = ((QWEN3, "half"), (DEEPSEEK, "half"), (DEEPSEEK, "fp8"), (QWEN3, "int8"))


def jobs(chip: Chip) -> list[Job]:
    """Every product of every model, at the row counts where the family's table changes tiles."""
    return [
        Job(experts, form, gated, entry["up_to"])
        for experts, form in MODELS
        for gated in (True, False)
        for entry in family_tiles(chip, form, gated)
    ]


def best_tile(job: Job, tiles: list[Tile]) -> tuple[Tile, dict[Tile, float]]:
    """The fastest of `tiles`, and the microseconds of each that gives the right answer."""
    data = job.draw(torch.device("cuda"))
    expected = job.run(data, tiles[0]).float()
    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            found = job.run(data, tile).float()
            if not (found - expected).norm() <= LARGEST_ERROR[job.form] * expected.norm():
                print(f"  WRONG: {tile}")
                continue
            times[tile] = time_us([partial(job.run, data, tile)] * (8 if tile.rows <= 16 else 1))
        except (RuntimeError, triton.TritonError) as failure:
            print(f"  failed: {tile}: {str(failure).splitlines()[0]}")
    return min(times, key=times.__getitem__), times


def tune(job: Job, chip: Chip, pool: ProcessPoolExecutor, *, specialize: bool) -> Tile:
    started = time.monotonic()
    tiles = candidates(job.form, job.gated, choose_tile(chip, job.product), chip)
    tiles = [tile for tile in tiles if specialize or not tile.specialize]
    compiles = pool.map(partial(compile_job, job, chip), tiles)
    usable = [tile for tile, ok in zip(tiles, compiles, strict=True) if ok]
    compiled_s = time.monotonic() - started
    best, times = best_tile(job, [tiles[0], *(tile for tile in usable if tile != tiles[0])])
    rate = job.flops / times[best] / 1e6
    print(
        f"{job}: {len(times)} of {len(tiles)} candidates, {compiled_s:.0f} + "
        f"{time.monotonic() - started - compiled_s:.0f} s; family {times[tiles[0]]:.1f} us, best {times[best]:.1f} us "
        f"({rate:.0f} TFLOP/s, {job.bytes / times[best] / 1e6:.2f} TB/s)"
    )
    for tile in sorted(times, key=times.__getitem__)[:5]:
        print(f"  {times[tile]:9.1f} us  {tile}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.tune")
    parser.add_argument("--only", default="", help="products whose name contains this")
    parser.add_argument("--write", action="store_true", help="put the best tiles into tiles.json")
    parser.add_argument("--no-specialize", action="store_true", help="leave warp specialisation out")
    asked = parser.parse_args()
    chip = chip_of(torch.device("cuda", 0))
    print(f"{chip}, torch {torch.__version__}, triton {triton.__version__}")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_quiet) as pool:
        for job in jobs(chip):
            if asked.only in str(job):
                with torch.inference_mode():
                    tile = tune(job, chip, pool, specialize=not asked.no_specialize)
                if (
                    asked.write
                ):  # at once: a kernel that hangs or breaks the GPU must not cost what is known by then
                    record(tuned_for(chip, job.product, job.up_to), tile, date.today().isoformat())
                torch.cuda.empty_cache()


def _quiet() -> None:
    """Compilers of candidates that do not work say so at length on stderr."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    main()
