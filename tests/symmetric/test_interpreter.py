"""Without a GPU, Triton's interpreter runs the dispatcher: the tests marked `cuda`, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "file",
    ["test_phases.py", "test_virtual_ranks.py", "test_any_layer.py", "test_processes.py", "test_deepep.py"],
)
def test_in_the_interpreter(file):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "cuda",
        "--hypothesis-profile",
        "interpreter",
    ]
    done = subprocess.run(
        [*command, f"tests/symmetric/{file}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
