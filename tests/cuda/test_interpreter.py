"""Without a GPU, Triton's interpreter runs every kernel on the CPU: the tests marked `cuda`, in processes of their own.

Triton decides when a kernel is defined whether it will be interpreted, so a process must begin with TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
FEWER = ["--hypothesis-profile", "interpreter"]
SUITES = {
    "cuda": ["tests/cuda", "--ignore", "tests/cuda/test_gpu.py"],
    "engine": ["tests/engines/test_cuda_plug.py", "tests/engines/test_cuda_graphs.py"],
    "contract": ["tests/contract/test_kernels.py", "tests/contract/test_permute.py", "-k", "own", *FEWER],
    "quantize": ["tests/contract/test_quantize.py", "-k", "own"],
    "split": ["tests/contract/test_split.py", "-k", "own", *FEWER],
    "int8": ["tests/contract/test_int8.py", "-k", "test_experts and own"],
    "fp8": ["tests/contract/test_fp8.py", "-k", "own or test_layer"],
    "layer": [
        "tests/contract/test_layer.py",
        "-k",
        "(test_dtypes_bias and level1 and float16) or (test_every_split and level1 and 2-1)",
    ],
    "symmetric phases": ["tests/symmetric/test_phases.py", *FEWER],
    "symmetric ranks": ["tests/symmetric/test_virtual_ranks.py"],
    "symmetric layers": ["tests/symmetric/test_any_layer.py", *FEWER],
    "symmetric processes": ["tests/symmetric/test_processes.py"],
    "deepep": ["tests/symmetric/test_deepep.py"],
}


@pytest.fixture(scope="module")
def runs(request):
    """The suites that were asked for, as many at a time as the machine has cores."""
    asked = [item.callspec.params["suite"] for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {suite: pool.submit(interpret, SUITES[suite]) for suite in asked}
        pool.shutdown(cancel_futures=True)


def interpret(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "cuda", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("suite", SUITES)
def test_in_the_interpreter(runs, suite):
    done = runs[suite].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
