"""Every case beside its peers in one run; `make bench-cuda`.

    python -m benchmarks.cuda [--lmdeploy FOLDER] [--only WORDS] [--out FILE]

LMDeploy's layers are timed too where it is installed, or where FOLDER holds its unpacked wheel
(`unzip lmdeploy-*.whl 'lmdeploy/pytorch/kernels/*'`). A contestant whose answer differs from the reference is not
timed.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.cases import CASES, Case
from benchmarks.cuda.ceilings import memory_rates, product_rate
from benchmarks.cuda.contestants import ROUTINGS, Contestant, contestants
from benchmarks.cuda.lmdeploy import LMDeploy
from benchmarks.cuda.model import H100_CEILINGS, Ceilings, floors_us, predicted_us
from benchmarks.cuda.picture import draw
from benchmarks.cuda.report import Report, machine_facts
from epbackend.kernels.triton.tiles import chip_of
from epbackend.kernels.triton.tuning import LARGEST_ERROR, time_us

RESULTS = Path(__file__).parents[1] / "results"


def measure(case: Case, who: Contestant) -> dict[str, Any]:
    """Its error and, where that is small, its time; or why there is none."""
    try:
        error = who.error()
        if not error <= LARGEST_ERROR[case.form]:
            return {"error": error, "failure": f"wrong by {error:.3f}"}
        us = time_us([partial(who.compute, n) for n in range(ROUTINGS)])
    except Exception as failure:  # whatever stops one contestant, the others are still timed
        return {"failure": f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"}
    return {"error": error, "us": us, "tflops": case.flops / us / 1e6, "tb_per_s": case.bytes / us / 1e6}


def run(case: Case, lmdeploy: LMDeploy | None, ceilings: Ceilings, report: Report) -> None:
    """One row a contestant, the floors and what was predicted beside it."""
    device = torch.device("cuda", 0)
    memory_us, compute_us = floors_us(case, ceilings)
    expected = predicted_us(case, chip_of(device))
    for who in contestants(case, device, lmdeploy):
        row = {
            "case": case.name,
            "by": who.name,
            "memory_us": memory_us,
            "compute_us": compute_us,
            "predicted_us": expected if who.name == "epbackend" else None,
            "target_us": case.target_us,
            "target_tflops": case.target_tflops,
            **measure(case, who),
        }
        print(line_of(row), flush=True)
        report.add(row)


def line_of(row: dict[str, Any]) -> str:
    figures = row.get("failure", "")
    if "us" in row:
        figures = f"{row['us']:9.1f} us {row['tflops']:6.0f} TFLOP/s {row['tb_per_s']:5.2f} TB/s"
    expected = f"  predicted {row['predicted_us']:.0f} us" if row["predicted_us"] else ""
    floors = f"floors {row['memory_us']:7.1f} {row['compute_us']:7.1f}"
    return f"{row['case']:40}{row['by']:20}{figures}  {floors}{expected}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda")
    parser.add_argument("--lmdeploy", type=Path, help="folder of an unpacked LMDeploy wheel")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "cuda.json", help="the JSON file; a picture beside it"
    )
    asked = parser.parse_args()
    torch.manual_seed(0)
    memory, flops = memory_rates(), product_rate()
    torch.cuda.empty_cache()
    bandwidth = max(memory.values())
    machine = machine_facts() | {
        "memory_tb_per_s": bandwidth / 1e12,
        "memory_by": {way: rate / 1e12 for way, rate in memory.items()},
        "bfloat16_tflops": flops / 1e12,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    ceilings = Ceilings(bandwidth, {**H100_CEILINGS.flops, "half": flops})
    lmdeploy = LMDeploy.found(asked.lmdeploy)
    report = Report(asked.out, machine)
    for case in CASES:
        if asked.only in case.name:
            with torch.inference_mode():
                run(case, lmdeploy, ceilings, report)
            torch.cuda.empty_cache()
    draw(report.rows, machine, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
