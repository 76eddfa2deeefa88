"""Tune the products that are benchmarked, on the GPU at hand: what maintainers run, without typer or pydantic.

    python -m benchmarks.cuda.tune [--only WORDS] [--write | --table FILE]

`--write` puts the best tiles into the packaged tiles.json, `--table` into another. Users have `epbackend tune`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import triton

from benchmarks.cuda.cases import DEEPSEEK, QWEN3
from epbackend.kernels.triton.tiles import PACKAGED, chip_of
from epbackend.kernels.triton.tuning import tune, tuning_cases

MODELS = ((QWEN3, "half"), (DEEPSEEK, "half"), (DEEPSEEK, "fp8"), (QWEN3, "int8"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.tune")
    parser.add_argument("--only", default="", help="products whose name contains this")
    parser.add_argument("--write", action="store_true", help="put the best tiles into tiles.json")
    parser.add_argument("--table", type=Path, help="put the best tiles into this file")
    asked = parser.parse_args()
    chip = chip_of(torch.device("cuda", 0))
    print(f"{chip}, torch {torch.__version__}, triton {triton.__version__}")
    wanted = [
        case for shape, form in MODELS for case in tuning_cases(shape, form, chip) if asked.only in str(case)
    ]
    table = PACKAGED if asked.write else asked.table
    for finding in tune(wanted, chip, table):
        print(finding)
        for tile in sorted(finding.us, key=finding.us.__getitem__)[:5]:
            print(f"  {finding.us[tile]:9.1f} us  {tile}")
        for failure in finding.dropped:
            print(f"  {failure}", flush=True)


if __name__ == "__main__":
    main()
