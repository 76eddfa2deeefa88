"""`epbackend renumber`, as people and programs run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from epbackend.cli import app
from epbackend.placement.formats import read_loads, write
from epbackend.placement.loads import Loads
from epbackend.placement.renumbering import FILE

pytestmark = pytest.mark.cpu

QWEN, DEEPSEEK = "tiny-qwen3-moe", "tiny-deepseek-v3"


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["renumber", *map(str, arguments)])


@pytest.fixture
def recorded(tmp_path):
    """The busier an expert, the lower its number."""
    tokens_YE = np.tile(np.round(10_000 * 0.9 ** np.arange(32)), (4, 1))
    write(Loads.of(tokens_YE), tmp_path / "loads.json", "sglang")
    return tmp_path / "loads.json"


@pytest.fixture
def recorded_deepseek(tmp_path, recorded):
    tokens_YE = read_loads(recorded).tokens_WYE[0].copy()
    tokens_YE[0] = 0
    write(Loads.of(tokens_YE), tmp_path / "deepseek.json", "sglang")
    return tmp_path / "deepseek.json"


def test_it_says_what_is_gained_and_what_it_wrote(run, recorded, tmp_path):
    out = tmp_path / "new"
    result = run(QWEN, "--loads", recorded, "--ranks", 8, "--nodes", 2, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["layers_changed"] == 4
    assert said["imbalance_before"] > 2
    assert said["imbalance_after"] < 1.01
    assert said["node_imbalance_before"] > 1.5
    assert said["node_imbalance_after"] <= said["node_imbalance_after_worst"] < 1.01
    assert said["bytes"] == pytest.approx((out / "model.safetensors").stat().st_size, rel=0.02)
    assert said["seconds"] > 0
    assert said["numbering"] == json.loads((out / FILE).read_text())["name"]

    result = run(out, "--undo", "--out", tmp_path / "back", "--json")
    assert (result.exit_code, json.loads(result.stdout)["layers_changed"]) == (0, 4)
    assert not (tmp_path / "back" / FILE).exists()


def test_people_see_both_balances(run, recorded, tmp_path):
    result = run(QWEN, "--loads", recorded, "--ranks", 2, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "32 experts, 4 of 4 layers are renumbered" in result.stdout
    assert "mean of 4 layers" in result.stdout
    assert "1 weight files written" in result.stdout


def test_nodes_that_gain_are_reason_enough(run, tmp_path):
    """The busiest rank has one expert to thank for it, and cannot be helped; its node can."""
    tokens_E = np.array([1000] + 7 * [0] + 8 * [100] + 16 * [0])
    write(Loads.of(np.tile(tokens_E, (4, 1))), tmp_path / "loads.json", "sglang")
    asked = (QWEN, "--loads", tmp_path / "loads.json", "--ranks", 4)
    refused = run(*asked, "--out", tmp_path / "none")
    assert (refused.exit_code, "busiest rank would have 0.0% less" in refused.stderr) == (2, True)
    assert "node" not in refused.output
    result = run(*asked, "--nodes", 2, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    of_ranks, of_nodes = result.stdout.split("busiest node, over the mean")
    assert re.search(r"worst layer +2\.2222 +2\.2222", of_ranks)
    assert re.search(r"worst layer +2\.0000 +1\.[123]", of_nodes)


def test_where_groups_leave_nothing_it_asks_for_force(run, recorded_deepseek, tmp_path):
    asked = (DEEPSEEK, "--loads", recorded_deepseek, "--ranks", 4, "--out", tmp_path / "new")
    result = run(*asked)
    assert result.exit_code == 2
    assert "in 4 groups" in result.stdout  # the balances come first
    assert (
        "gain: the busiest rank would have 0.0% less to do, since experts stay in the 4 groups"
        in result.stderr
    )
    assert not (tmp_path / "new").exists()
    forced = run(*asked, "--force", "--json")
    assert (forced.exit_code, json.loads(forced.stdout)["layers_changed"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([QWEN], "loads: give recorded loads and the ranks"),
        ([QWEN, "--undo"], "undo: .* was not renumbered"),
        ([QWEN, "--undo", "--ranks", "2"], "undo: needs neither"),
        (["nowhere", "--ranks", "2", "--loads", "loads.json"], "there is no model at nowhere"),
        ([QWEN, "--ranks", "2", "--loads", "none.json"], "none.json: there is no such file"),
    ],
)
def test_wrong_arguments_are_a_line(run, recorded, tmp_path, arguments, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "--out", "new")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert np.array([part in result.stderr for part in said.split(" .* ")]).all(), result.stderr


def test_it_needs_no_torch():
    code = "import sys, epbackend.cli.renumber; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
