"""The script that docs/layer.md shows runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.patience import PATIENCE_S

SCRIPT = Path(__file__).parents[2] / "examples" / "layer_torchrun.py"


def test_the_torchrun_example_checks_its_own_answer():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0: 10 tokens right, alltoall" in done.stdout
    assert "rank 1: 11 tokens right, alltoall" in done.stdout
