"""Tune the products that are benchmarked, on the GPU at hand: what maintainers run, without typer or pydantic.

    python -m benchmarks.cuda.tune [--only WORDS ...] [--quick] [--write | --table FILE]
    python -m benchmarks.cuda.tune --merge FILE

`--write` puts the best tiles into the packaged tiles.json, `--table` into another, which `--merge` takes into the
packaged one later, on any machine. `--quick` tries few tiles, within a minute or two. Users have `epbackend tune`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton

from benchmarks.cuda.cases import DEEPSEEK, QWEN3
from benchmarks.cuda.shortlist import shortlist
from epbackend.kernels.triton.tiles import PACKAGED, Tile, chip_of, record
from epbackend.kernels.triton.tuning import TuningResult, candidates, tune, tuning_cases

MODELS = ((QWEN3, "half"), (DEEPSEEK, "half"), (DEEPSEEK, "fp8"), (QWEN3, "int8"))
SHOWN = 5
"""Tiles of a product."""


def merge(source: Path, target: Path) -> None:
    """Put the tuned tiles of one table into another, in the place of earlier ones for the same."""
    for found in json.loads(source.read_text())["tuned"]:
        tuned = {name: value for name, value in found.items() if name not in ("tile", "date")}
        record(target, tuned, Tile(**found["tile"]), found["date"])


def lines_of(found: TuningResult) -> str:
    """The fastest tiles, the one in use, and what was dropped."""
    tiles = sorted(found.us, key=found.us.__getitem__)
    kept = [tile for place, tile in enumerate(tiles) if place < SHOWN or tile == found.in_use]
    shown = [f"{found.us[tile]:9.1f} us  {tile}{'  (in use)' * (tile == found.in_use)}" for tile in kept]
    return "\n  ".join([str(found), *shown, *found.dropped])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.tune")
    parser.add_argument("--only", nargs="+", default=[""], help="products whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="few tiles (shortlist.py)")
    parser.add_argument("--write", action="store_true", help="put the best tiles into tiles.json")
    parser.add_argument("--table", type=Path, help="put the best tiles into this file")
    parser.add_argument("--merge", type=Path, help="put this file's tiles into tiles.json, and time nothing")
    asked = parser.parse_args()
    if asked.merge:
        return merge(asked.merge, PACKAGED)
    chip = chip_of(torch.device("cuda", 0))
    print(f"{chip}, torch {torch.__version__}, triton {triton.__version__}")
    wanted = [
        case
        for shape, form in MODELS
        for case in tuning_cases(shape, form, chip)
        if any(words in str(case) for words in asked.only)
    ]
    choose = shortlist if asked.quick else candidates
    for found in tune(wanted, chip, PACKAGED if asked.write else asked.table, choose):
        print(lines_of(found), flush=True)


if __name__ == "__main__":
    main()
