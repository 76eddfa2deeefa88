"""`epbackend run`: LMDeploy's own commands and a script, unchanged but for two words, with expert parallelism."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import requests
from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
from transformers import AutoTokenizer

from epbackend import EPConfig
from epbackend.cli import main
from epbackend.engines.lmdeploy import handover
from epbackend.engines.lmdeploy.processes import free_port
from epbackend.errors import ConfigError
from tests.helpers.engine_models import prompts
from tests.helpers.engines import await_model, complete
from tests.helpers.forked_engines import forked_context
from tests.helpers.patience import PATIENCE_S

COMMAND = """
from epbackend.cli import main

if __name__ == "__main__":
    main()
"""

SCRIPT = """
import multiprocessing
import sys

import lmdeploy

if __name__ == "__main__":
    settings = lmdeploy.PytorchEngineConfig(ep=2, session_len=256, dtype="bfloat16")
    with lmdeploy.pipeline("tiny-qwen3-moe", backend_config=settings, log_level="ERROR") as pipe:
        pipe("def main(", do_preprocess=False)
        ranks = [each for each in multiprocessing.active_children() if each.name.startswith("ExecutorProc")]
        print("RANKS", len(ranks), "ARGUMENTS", *sys.argv[1:], flush=True)
"""


# With dp > 1 LMDeploy's command ends the servers, and then itself with 0.
@pytest.mark.parametrize(
    ("sizes", "ended_with"),
    [
        (("--ep", "2"), 128 + signal.SIGTERM),
        pytest.param(("--ep", "2", "--dp", "2"), 0, marks=pytest.mark.slow),
    ],
    ids=["dp1", "dp2"],
)
def test_the_api_server_of_lmdeploy_spreads_the_experts(
    sizes, ended_with, checkpoint, reference, start_process
):
    model, port = checkpoint("qwen3-moe"), free_port()
    server = (
        "lmdeploy", "serve", "api_server", str(model), *sizes, "--server-port", str(port), "--model-name", "tiny",
        "--session-len", "400",
    )  # fmt: skip
    running = start_process(
        COMMAND, "run", "--device", "cpu", "--ep-level", "2", *server, ready="startup complete"
    )
    host = re.search(r"http://([\d.]+):", running.log.read_text())[1]
    await_model(port, host)
    running.look()
    answer = complete(port, prompts()[0], host)
    expected = AutoTokenizer.from_pretrained(model).decode(reference("qwen3-moe")[0])
    assert answer.strip("\ufffd") == expected.strip("\ufffd")
    assert len(running.workers()) >= 2
    refused = requests.post(
        f"http://{host}:{port}/v1/completions", json={"model": "tiny", "prompt": ""}, timeout=PATIENCE_S
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.process.wait(timeout=PATIENCE_S) == ended_with
    running.assert_nothing_left()


@pytest.mark.slow
def test_a_script_spreads_the_experts(tmp_path, start_process):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    options = ("--device", "cpu", "--set", "engine.cache_gb=0.05")
    said = "RANKS 2 ARGUMENTS --config mine"
    running = start_process(COMMAND, "run", *options, "python", str(script), "--config", "mine", ready=said)
    assert running.process.wait(timeout=PATIENCE_S) == 0
    running.assert_nothing_left()


def test_a_script_that_fails_says_what_python_says(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("import no_such_package_of_mine\n")
    log = tmp_path / "log"
    ended = forked_context().Process(target=run_command, args=(log, "--device", "cpu", "python", str(script)))
    ended.start()
    ended.join(PATIENCE_S)
    said = log.read_text()
    assert ended.exitcode == 1, said
    assert f'File "{script}", line 1' in said
    assert said.splitlines()[-1].startswith("ModuleNotFoundError: No module named 'no_such_package")
    assert "pip install" not in said


def run_command(log: Path, *words: str) -> None:
    """`epbackend run`, in a process that it may leave as it likes."""
    with log.open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    sys.argv = ["epbackend", "run", *words]
    main()


def test_what_the_program_sets_and_what_run_was_told_become_one_config():
    told = EPConfig.load(
        {"device": "cpu", "ep_level": 2, "engine": {"cache_gb": 0.1, "extra": {"empty_init": True}}}
    )
    theirs = PytorchEngineConfig(ep=4, dp=2, session_len=512, max_batch_size=8, revision="main")
    config = handover.combined(told, theirs)
    assert (config.ep_size, config.engine.dp, config.ep_level, config.device) == (4, 2, 2, "cpu")
    assert (config.engine.session_len, config.engine.max_batch_size) == (512, 8)
    assert (config.engine.cache_gb, config.engine.extra) == (0.1, {"empty_init": True})
    # A size that the program leaves open is the one that run was told.
    assert handover.combined(EPConfig.load({"ep_size": 2}), PytorchEngineConfig()).ep_size == 2


@pytest.mark.parametrize(
    ("told", "theirs", "said"),
    [
        ({"ep_size": 2}, {"ep": 4}, "ep_size: epbackend run was told 2, and the program gives LMDeploy ep 4"),
        ({"engine": {"session_len": 100}}, {"session_len": 200}, "engine.session_len: .* told 100"),
        ({"device": "cpu"}, {"device_type": "ascend"}, "device: .* told cpu"),
        ({"engine": {"extra": {"revision": "a"}}}, {"revision": "b"}, "engine.extra.revision"),
        ({}, {"ep": 4, "tp": 2}, r"engine.tp \(from LMDeploy's tp\): must be 1 or 4"),
        ({}, {"ep": 2, "enable_eplb": True}, "enable_eplb: .*remove it"),
    ],
)
def test_a_contradiction_is_an_error_that_names_both(told, theirs, said):
    with pytest.raises(ConfigError, match=said):
        handover.combined(EPConfig.load(told), PytorchEngineConfig(**theirs))


def test_an_engine_that_the_plug_cannot_reach_is_refused():
    with pytest.raises(ConfigError, match=r"made with TurbomindEngineConfig.*--backend pytorch"):
        handover.plug_in("model", TurbomindEngineConfig())


@pytest.mark.parametrize("command", [["vllm", "serve"], ["python", "no-such.py"], ["python", "-c", "1"]])
def test_what_is_no_such_program_is_refused(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["epbackend", "run", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: epbackend run:" in capsys.readouterr().err
