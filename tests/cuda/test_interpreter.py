"""Without a GPU, Triton's interpreter runs every kernel on the CPU: the tests marked `cuda`, in a process of their own.

Triton decides when a kernel is defined whether it will be interpreted, so the process must begin with TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
FEWER = ["--hypothesis-profile", "interpreter"]
SUITES = {
    "contract": ["tests/contract/test_kernels.py", "tests/contract/test_permute.py", "-k", "own", *FEWER],
    "split": ["tests/contract/test_split.py", "-k", "own", *FEWER],
    "int8": ["tests/contract/test_int8.py", "-k", "test_experts and own"],
    "fp8": ["tests/contract/test_fp8.py", "-k", "own or test_layer"],
    "cuda": ["tests/cuda", "--ignore", "tests/cuda/test_gpu.py"],
    "layer": [
        "tests/contract/test_layer.py",
        "-k",
        "(test_dtypes_bias and level1 and float16) or (test_every_split and level1 and 2-1)",
    ],
}


@pytest.mark.parametrize("suite", SUITES)
def test_in_the_interpreter(suite):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "cuda", *SUITES[suite]]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
