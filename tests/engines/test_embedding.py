"""Pipelines of several ranks where programs build them: in threads, in other processes, in scripts of every kind."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest

import epbackend
from epbackend.errors import ConfigError
from tests.helpers.engine_models import prompts
from tests.helpers.engines import GREEDY, config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.ranks import forking

pytestmark = [pytest.mark.cpu, pytest.mark.engine]
SCRIPT = """
import epbackend

epbackend.pipeline("tiny-qwen3-moe", epbackend.EPConfig.load({"device": "cpu", "ep_size": 2}))
"""
ENABLED = """
import lmdeploy

import epbackend
from epbackend.engines.lmdeploy import engine_config
from epbackend.models import resolve

config = epbackend.EPConfig.load({"device": "cpu", "ep_size": 2})
epbackend.enable(config)
pipe = lmdeploy.pipeline(resolve("tiny-qwen3-moe"), backend_config=engine_config(config))
"""


@pytest.mark.slow
def test_a_thread_builds_a_pipeline(checkpoint, reference):
    answers: list[Any] = []

    def answer() -> None:
        with epbackend.pipeline(str(checkpoint("qwen3-moe")), config(ep_size=2)) as pipe:
            answers.extend(pipe(prompts()[:2], gen_config=GREEDY, do_preprocess=False))

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join(PATIENCE_S)
    assert [each.token_ids for each in answers] == reference("qwen3-moe")[:2]


def test_a_daemonic_process_is_told_that_it_may_not():
    context = forking()
    theirs, ours = context.Pipe()
    process = context.Process(target=_refused, args=(ours,), daemon=True)
    process.start()
    ours.close()
    assert "a daemonic process may not start any: make it with daemon=False" in theirs.recv()
    process.join()


def _refused(connection: Any) -> None:
    try:
        epbackend.pipeline("tiny-qwen3-moe", config(ep_size=2))
    except ConfigError as error:
        connection.send(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("script", [SCRIPT, ENABLED], ids=["pipeline", "enable"])
def test_a_script_without_a_main_guard_is_told_so_in_a_few_lines(tmp_path, script):
    (tmp_path / "script.py").write_text(script)
    said = _fails([sys.executable, "script.py"], tmp_path)
    assert 'starts ranks again: put that under if __name__ == "__main__":' in said.splitlines()[-1]


def test_ranks_of_torchrun_start_no_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"under torchrun .*: start the program by python alone"):
        epbackend.pipeline("tiny-qwen3-moe", config(ep_size=2))


def test_a_program_from_stdin_is_told_to_be_saved(tmp_path):
    said = _fails([sys.executable], tmp_path, SCRIPT)
    assert "ranks import the program that starts them, and <stdin> is no file: save it" in said


def _fails(command: list[str], folder: Any, program: str | None = None) -> str:
    """What a failing command says."""
    done = subprocess.run(
        command, input=program, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode != 0
    return done.stderr
