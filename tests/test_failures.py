"""What a failed test tells, however early its run is cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[1]
FAILS = """
from tests.helpers.notes import note

def test_it():
    note("asked")
    values = [1, 2]
    for value in values:
        assert value == 1
"""


@pytest.fixture
def said(tmp_path):
    """What is told at once, before the summary."""
    (tmp_path / "test_it.py").write_text(FAILS)

    def run(**environment: str) -> str:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.conftest",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout.partition("= FAILURES =")[0]

    return run


def test_the_reason_in_a_line(said):
    at_once = said()
    assert "test_it.py::test_it: E           assert 2 == 1" in at_once
    assert "values = [1, 2]" not in at_once


def test_the_whole_where_that_is_asked_for(said):
    at_once = said(EPBACKEND_WHOLE_FAILURES="60")
    assert "values = [1, 2]" in at_once
    assert "E           assert 2 == 1" in at_once
    assert "-- Captured stdout call" in at_once
    assert ": asked" in at_once


def test_its_last_lines_alone(said):
    at_once = said(EPBACKEND_WHOLE_FAILURES="3")
    assert "E           assert 2 == 1" in at_once
    assert "values = [1, 2]" not in at_once


def test_notes_are_read_while_a_test_runs(said, tmp_path):
    notes = tmp_path / "notes.txt"
    at_once = said(EPBACKEND_WHOLE_FAILURES="60", EPBACKEND_TEST_NOTES=str(notes))
    assert notes.read_text().endswith(" test_it.py::test_it (call): asked\n")
    assert ": asked" not in at_once


def test_a_check_in_a_helper_says_what_it_found():
    pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")
    from tests.helpers.answers import NEW_TOKENS, Answer, Rounding, compare

    tokens = [1] * NEW_TOKENS
    expected, found = (Answer(tokens, [logprob] * NEW_TOKENS) for logprob in (-1.5, -1.75))
    with pytest.raises(AssertionError, match=r"-1\.75.*-1\.5"):
        compare([found], [expected], Rounding(0.1))
