"""The folder that `make gather-gpu` makes, on the machine where it is unpacked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
FIXED = Path(__file__).parents[1] / "scripts" / "gpu_folder"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def unpack(tmp_path):
    """Run the script of a folder with one wheel; gives its exit code, what it says, and the site."""
    folder, site = tmp_path / "folder", tmp_path / "site"
    (folder / "wheels").mkdir(parents=True)
    shutil.copy(FIXED / "unpack.py", folder)
    with zipfile.ZipFile(folder / "wheels" / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "name = 1")
        wheel.writestr("thing/of_another_python.py", "print 1")
        wheel.writestr("thing-1.data/purelib/other.py", "name = 2")

    def run(python: str = HERE, there: tuple[str, ...] = ("torch",)) -> tuple[int, str, Path]:
        (folder / "gathered.json").write_text(json.dumps({"python": python, "there": there}))
        command = [sys.executable, str(folder / "unpack.py"), str(site)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, site

    return run


def test_wheels_are_unpacked_and_compiled_once(unpack):
    code, said, site = unpack()
    assert (code, said) == (0, "")
    assert len(list(site.rglob("*.pyc"))) == 2, "one of the three files is no Python of today"
    program = "import thing, other; print(thing.name, other.name, thing.__cached__)"
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=site, capture_output=True, text=True)
    one, two, compiled = done.stdout.split()
    assert (one, two, Path(compiled).exists()) == ("1", "2", True)
    shutil.rmtree(site / "thing")
    assert unpack()[:2] == (0, "")
    assert not (site / "thing").exists()


def test_another_python_and_what_is_missing_are_named(unpack):
    assert unpack(python="3.9")[:2] == (
        1,
        f"the wheels are for Python 3.9, and this is {HERE}: gather with --python {HERE}\n",
    )
    code, said, site = unpack(there=("torch", "no-such-package"))
    assert (code, said) == (1, "not installed here: no-such-package; gather with --with no-such-package\n")
    assert not site.exists()
