"""The script that docs/layer.md shows runs as it stands."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S
from tests.helpers.ranks import forking, free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "layer_torchrun.py"


def run_script(log: Path, environment: dict[str, str]) -> None:
    """On a rank that was not started by torchrun, but told what one of torchrun's is."""
    os.environ.update(environment)
    with log.open("w") as out:
        sys.stdout = sys.stderr = out
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_example_checks_its_own_answer(tmp_path):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    logs = [tmp_path / f"rank{rank}" for rank in range(2)]
    processes = [
        forking().Process(target=run_script, args=(log, meeting | {"RANK": str(rank)}), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    said = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [0, 0], said
    assert_right(*said)


@pytest.mark.slow
def test_torchrun_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert_right(done.stdout, done.stdout)


def assert_right(said_first: str, said_second: str) -> None:
    assert "rank 0: 10 tokens right, alltoall" in said_first
    assert "rank 1: 11 tokens right, alltoall" in said_second
