"""`make test-vendor`: op-plugin's own tests of the operators that a model calls here, on emulated NPUs.

They run unmodified, from a checkout that the user names; nothing of it is here. The table says of each whether it
passed, needs what is not emulated, or failed and why.

    python -m tests.helpers.vendor_tests FOLDER --device A2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from tests.helpers import ascend

OPERATORS = (
    *("moe_init_routing_v2", "moe_token_unpermute", "grouped_matmul", "grouped_matmul_swiglu_quant_v2"),
    *("swiglu", "dynamic_quant", "dequant_swiglu_quant", "quant_matmul", "rms_norm", "add_rms_norm"),
    *("moe_gating_top_k", "moe_gating_top_k_softmax", "moe_distribute_dispatch_v2"),
    *("moe_distribute_combine_v2", "fused_infer_attention_score", "atb_reshape_and_cache"),
    *("atb_paged_attention",),
)
"""Those of `kernels/npu/ops.py`, of `ascend_attention.py`, and of dlinfer below a bfloat16 or W8A8 model."""

PASSED, SKIPPED, NOT_EMULATED, FAILED = "passed", "skipped", "not emulated", "failed"
SECONDS = 600
"""For one file: some wait for ranks that never come."""


def files(checkout: Path) -> list[Path]:
    """The tests of these operators, wherever a release keeps them.

    Raises:
        SystemExit: the folder has none.
    """
    names = {f"test_{prefix}{operator}.py" for operator in OPERATORS for prefix in ("", "npu_")}
    found = sorted(file for file in checkout.rglob("test_*.py") if file.name in names)
    if not found:
        sys.exit(
            f"{checkout} holds no test of these operators: name a checkout of op-plugin, OPPLUGIN=folder"
        )
    return found


def outcomes(file: Path, chip: str) -> Iterator[tuple[str, str, str]]:
    """(test, outcome, reason) of each test in a file, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            folder,
            "--junitxml",
            str(report),
        ]
        command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, str(file)]
        environment = os.environ | ascend.environment(chip, ascend.DEVICES)
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            yield file.stem, FAILED, f"not done in {SECONDS} s"
            return
        if not report.exists():
            yield file.stem, FAILED, _last_line(done.stdout + done.stderr)
            return
        for case in ElementTree.parse(report).iter("testcase"):
            yield (f"{file.stem}: {case.get('name')}", *_outcome(case))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    if (skipped := case.find("skipped")) is not None:
        return SKIPPED, _last_line(skipped.get("message") or "")
    failure = case.find("failure") if case.find("error") is None else case.find("error")
    if failure is None:
        return PASSED, ""
    text = failure.text or ""
    # Pytest marks the lines of the error itself; others show values, which may have failed to be shown.
    said = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    refused = [line for line in said if "not emulated" in line]
    return (NOT_EMULATED, refused[0]) if refused else (FAILED, said[-1] if said else _last_line(text))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--device", choices=("A2", "A3"), default="A2")
    arguments = parser.parse_args()
    if reason := ascend.missing(arguments.device):
        sys.exit(f"skipped: {reason}")
    print("| test | outcome | reason |\n|---|---|---|", flush=True)
    counted: Counter[str] = Counter()
    for file in files(arguments.checkout):
        for test, outcome, reason in outcomes(file.resolve(), arguments.device):
            counted[outcome] += 1
            print(f"| {test} | {outcome} | {reason[:160].replace('|', '/')} |", flush=True)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counted.items()))


if __name__ == "__main__":
    main()
