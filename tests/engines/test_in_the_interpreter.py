"""Without a GPU, the tests of the CUDA plug run in Triton's interpreter, in a process of their own.

Triton decides when a kernel is defined whether it will be interpreted, so the process must begin with TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


def test_the_cuda_plug():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "cuda", "tests/engines/test_cuda_plug.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
