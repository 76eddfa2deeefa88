"""Scripts and commands that run transformers' models on several processes, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
        timeout=PATIENCE_S,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["2", "4"])
def test_the_demo_by_transformers_places_experts_and_keeps_the_tokens(ranks, tmp_path):
    options = ("--engine", "transformers", "--json", "--ranks", ranks, "--max-new-tokens", "12")
    done = run("epbackend", "demo", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["engine"], said["ranks"], said["dispatcher"]) == ("transformers", int(ranks), "alltoall")
    assert said["tokens_identical"] is True
    assert said["placement"]["tokens_identical"] is True
    before, after = said["placement"]["before"], said["placement"]["after"]
    assert after["step_imbalance_mean"] < before["step_imbalance_mean"]


@pytest.mark.slow
def test_the_torchrun_example_answers_on_each_rank_and_records_loads(tmp_path):
    script = str(ROOT / "examples" / "transformers_torchrun.py")
    done = run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "rank 0: 'Fellow citizens",
        "rank 1: 'In the year 1861",
        "rank 0: 'class Parser",
        "expert tokens of each",
    ):
        assert said in done.stdout
    assert len(json.loads((tmp_path / "loads.json").read_text())["logical_count"]) == 4


@pytest.mark.slow
def test_attention_that_ranks_cannot_cut_is_refused_by_name(tmp_path):
    script = tmp_path / "cut.py"
    script.write_text(
        "from transformers import AutoModelForCausalLM\n"
        "from epbackend import EPConfig\n"
        "from epbackend.engines.transformers import distributed_config\n"
        "from epbackend.models import resolve\n"
        "config = EPConfig.load({'device': 'cpu', 'ep_size': 4})\n"
        "asked = distributed_config(config)\n"
        "AutoModelForCausalLM.from_pretrained(resolve('tiny-qwen3-moe'), distributed_config=asked)\n"
    )
    done = run("torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script), cwd=tmp_path)
    assert done.returncode != 0
    assert (
        "cuts attention among 4 ranks, which the 2 key-value heads of Qwen3MoeForCausalLM do not allow"
        in done.stderr
    )
