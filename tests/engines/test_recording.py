"""Loads of a real run: what is written is what was routed, in a file that is whole at any moment."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from transformers import AutoTokenizer

from epbackend.engines.lmdeploy import LoadReport
from epbackend.engines.lmdeploy.load.calibration import CALIBRATE_VARIABLE, calibrating
from epbackend.engines.lmdeploy.load.pairs import PAIRS_VARIABLE, counting_pairs
from epbackend.engines.lmdeploy.load.recording import Recording
from epbackend.engines.lmdeploy.processes import free_port
from epbackend.errors import ConfigError, EPError
from epbackend.models import resolve
from epbackend.placement.formats import read_loads
from tests.helpers.engine_models import EXPERTS, NEW_TOKENS, TOP_K, prompts
from tests.helpers.engines import await_model, complete, config
from tests.helpers.patience import PATIENCE_S

SERVE = """
import sys
from pathlib import Path
from epbackend import EPConfig
from epbackend.engines.lmdeploy import serve
from epbackend.engines.lmdeploy.load import recording

recording.EVERY_S = 0.5
if __name__ == "__main__":
    model, config, port, path = sys.argv[1:]
    serve(model, EPConfig.from_json(config), port=int(port), record=Path(path), model_name="tiny")
"""


def report(tokens_RYE) -> LoadReport:
    return LoadReport(
        (1, 2, 3), np.array([tokens_RYE, np.zeros_like(tokens_RYE)]), 1, 1, 1, {}, np.ones(3), top_k=2
    )


def test_the_file_is_what_planners_read(tmp_path):
    file = Recording.of(tmp_path / "loads.json", resolve("tiny-deepseek-v3"), ep_size=2)
    file.write(report(np.ones((2, 3, 32), dtype=np.int64)))
    loads = read_loads(tmp_path / "loads.json")
    assert loads.tokens_WYE.shape == (1, 4, 32)
    assert loads.loaded_layers == (1, 2, 3)
    assert (loads.tokens_WYE[0, 1:] == 2).all()
    assert [each.name for each in tmp_path.iterdir()] == ["loads.json"]


def test_recording_without_a_token_fails_and_writes_nothing(tmp_path):
    file = Recording.of(tmp_path / "loads.json", resolve("tiny-deepseek-v3"), ep_size=2)
    with pytest.raises(EPError, match="no expert has had a token"):
        file.write(report(np.zeros((2, 3, 32), dtype=np.int64)))
    assert not file.path.exists()


def test_a_path_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"record: .*file/loads.json cannot be written"):
        Recording.of(tmp_path / "file" / "loads.json", resolve("tiny-deepseek-v3"), ep_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "/tmp/of-the-user"])
@pytest.mark.parametrize(
    ("variable", "asking"),
    [
        (CALIBRATE_VARIABLE, lambda: calibrating(1, (1,), 1)),
        (PAIRS_VARIABLE, lambda: counting_pairs(1, 1, "of a test", None)),
    ],
    ids=["times", "pairs"],
)
def test_the_folder_that_workers_are_told_is_put_back(variable, asking, before, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    if before:
        monkeypatch.setenv(variable, before)
    with asking():
        assert os.environ[variable] != before
    assert os.environ.get(variable) == before


def test_a_server_counts_its_requests_and_not_its_warm_up(checkpoint, start_process, tmp_path):
    model, port, path = checkpoint("qwen3-moe"), free_port(), tmp_path / "loads.json"
    settings = config({"log_level": "INFO"}, ep_size=2, ep_level=2)
    ready = "expert loads are counted from now on"
    running = start_process(SERVE, str(model), settings.to_json(), str(port), str(path), ready=ready)
    await_model(port)
    running.look()
    texts = prompts()[:4]
    for text in texts:
        complete(port, text)
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(timeout=PATIENCE_S)
    counts_LE = np.array(json.loads(path.read_text())["logical_count"])
    assert counts_LE.shape == (3, EXPERTS)
    (routed,) = set(counts_LE.sum(axis=1).tolist())  # every layer routed the same tokens
    assert routed % TOP_K == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = sum(len(tokenizer(text).input_ids) for text in texts)
    # Of each answer the last token need not be fed back, but may be.
    assert 0 <= routed // TOP_K - asked - len(texts) * (NEW_TOKENS - 1) <= len(texts)
    running.assert_nothing_left()
