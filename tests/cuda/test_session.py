"""`make gpu` where there is no GPU: its order, its times, what it writes, what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.cuda import session as module
from benchmarks.cuda.session import Part, Session, outcomes, parts, summary
from tests.helpers.patience import PATIENCE_S

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[2]
PYTEST = """
tests/a/test_x.py::test_one[a b] PASSED                                  [ 25%]
tests/a/test_x.py::test_two SKIPPED (cuda: there is no GPU)              [ 50%]
[gw1] [ 75%] FAILED tests/a/test_x.py::test_three[False-True] 
[gw0] [100%] ERROR tests/a/test_y.py::test_four 
=========================== short test summary info ============================
FAILED tests/a/test_x.py::test_three[False-True] - AssertionError: [ 12%]
"""  # noqa: W291


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def kept(session: Session) -> list[dict]:
    return json.loads((session.out / "session.json").read_text())["parts"]


def test_a_part_passes_fails_or_is_skipped(tmp_path):
    session = Session(tmp_path / "new", 60)
    session.run(Part("good", "it prints", 30, (python("print('hello')"),)))
    session.run(
        Part("bad", "the next command runs all the same", 30, (python("exit(3)"), python("print(1)")))
    )
    session.run(Part("lacking", "a program", 30, (python(""),), program="no-such-program"))
    assert [(row["part"], row["ended"]) for row in kept(session)] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("lacking", "skipped"),
    ]
    assert kept(session)[1]["exit_codes"] == [3, 0]
    assert "\nhello\n" in session.log("good").read_text()
    assert "\n1\n" in session.log("bad").read_text()
    assert "no-such-program is not on the PATH" in summary(session)


def test_a_part_ends_with_its_time_and_takes_along_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    session = Session(tmp_path, 60)
    began = time.monotonic()
    row = session.run(Part("slow", "it hangs", 4, (python(parent), python("print('never')"))))
    assert time.monotonic() - began < 300
    assert (row["ended"], row["exit_codes"]) == ("out of time", [None, None])
    said = session.log("slow").read_text()
    assert "\nnever\n" not in said
    started = int(said.strip().splitlines()[1])
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{started}/cmdline").exists() and Path(f"/proc/{started}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.1)


def test_no_part_begins_where_no_time_is_left(tmp_path):
    session = Session(tmp_path, module.SHORTEST_S - 1)
    assert session.run(Part("late", "it would print", 30, (python("print('no')"),)))["ended"] == "skipped"
    assert not session.log("late").exists()


MEET = """
import pathlib, sys, time
mine, theirs = (pathlib.Path(sys.argv[1]) / name for name in sys.argv[2:])
mine.touch()
deadline = time.monotonic() + 60
while not theirs.exists():
    assert time.monotonic() < deadline, "it is not there"
    time.sleep(0.05)
"""
"""Passes where the other one runs at the same time."""


def meeting(folder: Path, mine: str, theirs: str) -> tuple[list[str]]:
    return ([*python(MEET), str(folder), mine, theirs],)


def test_parts_that_time_nothing_run_side_by_side_and_the_others_alone_after_them(tmp_path):
    session = Session(tmp_path / "new", 120)
    alone = f"import pathlib; assert sorted(p.name for p in pathlib.Path({str(tmp_path)!r}).glob('?')) == ['a', 'b']"
    ends = "import pathlib, time; time.sleep(1); pathlib.Path('{}').touch()"
    session.run_all(
        [
            Part(
                "first", "is timed", 90, (python(alone), python(ends.format(tmp_path / "ended"))), timed=True
            ),
            Part("one", "meets the other", 90, meeting(tmp_path, "a", "b")),
            Part("two", "meets the other", 90, meeting(tmp_path, "b", "a")),
            Part(
                "second", "is timed", 90, (python(f"assert open({str(tmp_path / 'ended')!r})"),), timed=True
            ),
        ]
    )
    ended = {row["part"]: row["ended"] for row in kept(session)}
    assert ended == dict.fromkeys(("one", "two", "first", "second"), "passed"), session.log("one").read_text()
    assert list(ended)[2:] == ["first", "second"]


def test_what_is_interrupted_leaves_nothing(tmp_path):
    """Ctrl-C reaches the session alone: its parts run in sessions of their own."""
    hangs = python("import time; print(1, flush=True); time.sleep(600)")
    part = f"Part('slow', 'it hangs', 90, ({hangs!r},))"
    session = f"Session(pathlib.Path({str(tmp_path)!r}), 120)"
    code = f"import pathlib, sys; from benchmarks.cuda.session import *; {session}.run_all([{part}])"
    # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(python(code), cwd=ROOT, preexec_fn=heeding)
    log = tmp_path / "slow.log"
    deadline = time.monotonic() + PATIENCE_S
    while not (log.exists() and log.read_text().endswith("\n1\n")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE_S) != 0
    (row,) = json.loads((tmp_path / "session.json").read_text())["parts"]
    assert row["ended"] == "out of time"
    assert row["seconds"] < 60, "its command was ended"


def test_bytecode_is_kept_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    session = Session(tmp_path, 60)
    session.run(Part("asked", "", 30, (python("import sys; exit(sys.dont_write_bytecode)"),)))
    assert kept(session)[0]["ended"] == "passed"


def test_tests_are_counted_however_far_they_came():
    assert outcomes(PYTEST) == {
        "tests": {"error": 1, "failed": 1, "passed": 1, "skipped": 1},
        "failures": ["tests/a/test_x.py::test_three[False-True]", "tests/a/test_y.py::test_four"],
    }
    assert outcomes("nothing of pytest's") == {}


def test_the_summary_has_every_figure(tmp_path):
    session = Session(tmp_path, 60)
    session.machine = {"gpu": "a card"}
    session.parts = [{"part": "e2e", "what": "", "ended": "failed", "seconds": 3, **outcomes(PYTEST)}]
    layer = {"tokens": 16, "us": 200.0, "launches": 7.0, "host_us": 500.0}
    rows = {
        "layer": [layer | {"by": "epbackend"}, layer | {"by": "LMDeploy", "us": 250.0}],
        "kernels": [
            {"case": "bf16 T=1", "by": "epbackend", "us": 10.0},
            {"case": "bf16 T=1", "by": "cuBLAS loop", "us": 12.0},
            {"case": "bf16 T=1", "by": "epbackend, layer", "us": 20.0},
            {"case": "bf16 T=1", "by": "LMDeploy, layer", "us": 25.0},
            {"case": "bf16 T=1", "by": "torch._grouped_mm", "failure": "not here"},
        ],
    }
    for name, measured in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {}, "rows": measured}))
    shown = summary(session)
    assert "1 error, 1 failed, 1 passed, 1 skipped" in shown
    assert "failed: tests/a/test_y.py::test_four" in shown
    assert "epbackend 200.0 us, 7 launches, host 500 us | LMDeploy 250.0 us" in shown
    assert "0.800" in shown
    assert "rows 10.0 us (cuBLAS loop 12)" in shown
    assert "layer 20.0 us (LMDeploy 25)" in shown


def test_every_file_and_module_that_a_part_names_is_there(tmp_path):
    for part in parts(tmp_path):
        for command in part.commands:
            for word in command:
                assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), word
                module_file = ROOT / (word.replace(".", "/") + ".py")
                if word.startswith("benchmarks."):
                    assert module_file.exists() or module_file.with_suffix("").is_dir(), word


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.cuda.session", "--parts", "tests", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "no session: " in done.stderr
    assert "use device cpu" in done.stderr
    assert json.loads((tmp_path / "session.json").read_text())["parts"] == []


ASKING = """
import sys
from importlib import import_module
import torch
torch.version.cuda = "13.0"
asked = []
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
sys.modules["tests.engines.conftest"] = sys.modules["tests.helpers.moe_modules"] = sys
from tests.helpers.ranks import preloaded
for module in preloaded():
    import_module(module)
exit(", ".join(asked) or 0)
"""
"""Ends with an error where torch is asked for a GPU: what a CUDA build answers leaves forks without CUDA."""


def test_what_ranks_are_forked_from_asks_for_no_gpu():
    """In the part e2e, which has tests of engines and of two ranks on a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(python(ASKING), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


LACKING = "numba,llvmlite,ray,matplotlib,typer"
"""Packages that `make gather-gpu` does not bring."""


@pytest.mark.slow
def test_its_tests_are_found_where_packages_are_missing(tmp_path):
    """One module that cannot be imported would end the whole part."""
    for part in parts(tmp_path):
        for whole in (each for each in part.commands if "pytest" in each):
            arguments = list(whole)[list(whole).index("pytest") + 1 :]
            command = [sys.executable, "-m", "tests.helpers.lacking", LACKING, *arguments, "--collect-only"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{part.name}: {done.stdout[-3000:]}{done.stderr[-1000:]}"
            if part.name == "tests":
                assert "test_two_ranks_equal_the_dense_formula" in done.stdout, "gloo joins ranks on one GPU"
