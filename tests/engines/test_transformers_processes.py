"""Scripts and commands that run transformers' models on several processes, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from epbackend import renumber
from epbackend.cli.demo import engine_settings
from epbackend.config import EPConfig
from epbackend.engines.transformers.ranks import generate
from epbackend.models import resolve
from epbackend.placement.formats import write
from epbackend.placement.loads import ORIGINAL, Loads
from epbackend.placement.renumbering import Renumbering
from tests.helpers.patience import PATIENCE_S

MODEL, LAYERS, EXPERTS = "tiny-qwen3-moe", 4, 32
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
def test_a_placement_of_the_original_places_the_experts_of_a_renumbered_checkpoint(tmp_path):
    """Each rank holds the same experts as it would of the original, by their other numbers."""
    prompts = ["In the year 1861", "class Parser:"]
    loads = Loads.of(np.arange(1.0, 1 + LAYERS * EXPERTS).reshape(LAYERS, EXPERTS) ** 2, numbering=ORIGINAL)
    write(loads, file := tmp_path / "loads.json", "sglang")
    placement = tmp_path / "placement.json"
    options = ("--ranks", "2", "--slots", str(EXPERTS), "--out", str(placement))
    planned = run("epbackend", "plan", str(file), *options, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    settings = {"placement": {"file": str(placement)}}
    config = EPConfig.load(engine_settings("transformers", 2) | settings)
    renumber.write(renumber.plan_renumbering(MODEL, loads, ranks=2), tmp_path / "renumbered")
    original = generate(resolve(MODEL), config, prompts, 8)
    renumbered = generate(str(tmp_path / "renumbered"), config, prompts, 8)
    assert renumbered.token_ids == original.token_ids
    made = Renumbering.beside(tmp_path / "renumbered")
    assert made
    assert made.changed == tuple(range(LAYERS))
    for rank in range(2):
        by_old_number = np.empty((LAYERS, EXPERTS), dtype=np.int64)
        np.put_along_axis(by_old_number, made.old_YE, renumbered.load.tokens_RYE[rank], axis=1)
        assert np.array_equal(by_old_number, original.load.tokens_RYE[rank])


@pytest.mark.slow
def test_the_torchrun_example_answers_on_each_rank_and_records_loads(tmp_path):
    script = str(ROOT / "examples" / "transformers_torchrun.py")
    done = run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "rank 0: 'Fellow-Citizens",
        "rank 1: 'Call me Ishmael",
        "rank 0: 'def bisect_left",
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
