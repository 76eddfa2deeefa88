"""What all commands print, and where they write."""

import json
import os
import subprocess
import sys

import pytest

from epbackend.cli import main
from epbackend.errors import ConfigError
from epbackend.files import check_target
from tests.helpers.patience import PATIENCE_S

SAYING = """
from epbackend.cli.output import json_stdout

with json_stdout() as print_json:
    print("beside it")
    print_json({"text": "a dash \\u2014, half a character \\ud800"})
"""


def test_one_object_gets_out_in_any_locale():
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.run(
        [sys.executable, "-c", SAYING],
        env=os.environ | ascii_only,
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert json.loads(said.stdout) == {"text": "a dash \u2014, half a character \ud800"}
    assert said.stderr == b"beside it\n"


def test_the_end_of_a_file_is_an_error_like_others(monkeypatch, capsys):
    """Typer takes it for the end of what a person types."""

    def doctor() -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("epbackend.cli.doctor.doctor", doctor)
    monkeypatch.setattr("sys.argv", ["epbackend", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "error: RuntimeError: EOFError: Ran out of input" in capsys.readouterr().err


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "new", tmp_path / "file" / "new" / "newer"):
        with pytest.raises(ConfigError, match=f"out: {path} cannot be written; name a file"):
            check_target("out", path)
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "new" / "newer"):
        check_target("out", path)
