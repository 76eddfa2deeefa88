"""What of the GPU benchmarks runs without one: turns, deadlines, tables, files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.cuda.engine import ALONE, CASES, PLUG, SHAPES, Case, race, table, write_model
from benchmarks.cuda.report import Report
from epbackend.checkpoint import check_checkpoint, safetensors_types

pytestmark = pytest.mark.cpu
FEW = (Case(2, 3, 1), Case(1, 1, 5))


def sides(asked):
    def side(who, ms):
        def ask(case, turn):
            asked.append((who, case.name, turn))
            return {"ms": ms * (1 + turn), "in": 1, "out": case.requests * case.new_tokens}

        return ask

    return {ALONE: side(ALONE, 10.0), PLUG: side(PLUG, 9.0)}


def test_sides_take_turns_and_the_first_warms_up():
    asked, rows = [], []
    race(sides(asked), FEW, 2, time.monotonic() + 60, rows.append)
    assert [(who, turn) for who, case, turn in asked if case == "2 x 3"] == [
        (PLUG, 0),
        (ALONE, 0),
        (ALONE, 1),
        (PLUG, 1),
        (PLUG, 2),
        (ALONE, 2),
    ]
    assert len(rows) == len(asked) == 12
    assert "0.900  (0.900 to 0.900, 2 turns)" in table(rows)
    assert "20.0 ms" in table(rows), "the first turn does not count"


def test_nothing_begins_behind_the_deadline():
    rows = []
    race(sides([]), FEW, 2, time.monotonic() - 1, rows.append)
    assert rows == []


def test_each_turn_brings_other_texts():
    texts = [text for case in CASES for turn in (0, 1) for text in case.texts(turn)]
    assert len(set(texts)) > len(texts) / 2
    assert not set(CASES[0].texts(0)) & set(CASES[0].texts(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_whose_file_of_weights_holds_none(shape, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_model(tmp_path, shape, 3)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.num_experts) == (3, SHAPES[shape]["num_experts"])
    assert safetensors_types(tmp_path / "model.safetensors") == {}
    check_checkpoint(str(tmp_path))


@pytest.mark.engine
@pytest.mark.slow
def test_the_plugs_side_of_the_engine_runs_on_a_cpu(tmp_path):
    """Whole, as on a GPU: the model's folder, the engine in a process of its own, turns, the table."""
    pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")
    command = [sys.executable, "-m", "benchmarks.cuda.engine", "--device", "cpu", "--shape", "tiny"]
    command += ["--layers", "2", "--turns", "1", "--only", "1 x 128", "--out", str(tmp_path / "engine.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert [(row["turn"], row["by"], row["out"]) for row in rows] == [(0, PLUG, 128), (1, PLUG, 128)]
    assert f"{rows[1]['ms']:.1f} ms" in done.stdout


def test_a_report_is_whole_after_every_row(tmp_path):
    report = Report(tmp_path / "new" / "run.json", {"gpu": "none"})
    for number in range(2):
        report.add({"row": number})
        kept = json.loads(report.file.read_text())
        assert kept == {"machine": {"gpu": "none"}, "rows": [{"row": each} for each in range(number + 1)]}
    assert [file.name for file in report.file.parent.iterdir()] == ["run.json"]
