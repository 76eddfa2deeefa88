"""The commands as another user, with a read-only root and no home, as containers run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import epbackend
from tests.helpers.container import contained, no_containers
from tests.helpers.patience import PATIENCE_S

REPOSITORY = Path(epbackend.__file__).parents[1]
PYTHON = str(Path(sys.prefix) / "bin" / "python")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(no_containers() is not None, reason=f"no mount namespace: {no_containers()}"),
]


def run(*arguments: str) -> str:
    """What the command prints; a failure shows all of it."""
    done = subprocess.run(
        contained("env", f"PYTHONPATH={REPOSITORY}", PYTHON, "-m", "epbackend", *arguments),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_plan_compiles_what_it_cannot_keep():
    said = run("plan", "synthetic", "--ranks", "4", "--out", "/tmp/plan.json")
    assert "NUMBA_CACHE_DIR" in said


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu-demo", "cpu-dp2"])
def test_ranks_answer(config):
    settings = str(REPOSITORY / "configs" / f"{config}.yaml")
    words = ("-p", "Once upon a time", "--max-new-tokens", "4")
    assert run("generate", "tiny-qwen3-moe", "--config", settings, *words)
