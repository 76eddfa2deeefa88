"""What all commands print, and where they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from epbackend.cli import main
from epbackend.errors import ConfigError
from epbackend.files import check_target, replace_file
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


WRITING = """
import sys
from pathlib import Path
from epbackend.files import check_target, replace_file

check_target("out", Path(sys.argv[1]))
replace_file(Path(sys.argv[1]), b"all of it")
"""


def write_to(path: Path, stdout: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WRITING, str(path)],
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return done.stdout


def test_what_is_no_file_by_itself_is_written_to(tmp_path):
    """A link to /proc/self/fd/1 is what /dev/stdout is, whose place a file must never take."""
    stdout, pipe, link = (tmp_path / name for name in ("stdout", "pipe", "link"))
    stdout.symlink_to("/proc/self/fd/1")
    os.mkfifo(pipe)
    link.symlink_to("new")
    assert write_to(stdout, subprocess.PIPE) == "all of it"
    with (tmp_path / "redirected").open("w+") as file:
        write_to(stdout, file.fileno())
        assert file.read() == "all of it"
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, b"all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    replace_file(link, b"all of it")
    assert (tmp_path / "new").read_bytes() == b"all of it"
    assert (stdout.is_symlink(), pipe.is_fifo(), link.is_symlink()) == (True, True, True)
