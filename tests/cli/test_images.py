"""What docker/*.Dockerfile do, as far as it runs without a container tool: on a copy of what `COPY . .` brings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE_S

tomllib = pytest.importorskip("tomllib")

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").iterdir())


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    """The project's folder without what .dockerignore names: from the root, or anywhere with `**/` before it."""
    left_out = (ROOT / ".dockerignore").read_text().split()

    def ignored(folder: str, names: list[str]) -> set[str]:
        patterns = [
            each.removeprefix("**/") for each in left_out if folder == str(ROOT) or each.startswith("**/")
        ]
        return {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}

    return shutil.copytree(ROOT, tmp_path_factory.mktemp("image") / "epbackend", ignore=ignored)


def run(folder: Path, *command: str) -> str:
    """What the command prints; fail unless it ends well."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_an_image_names_extras_and_a_program_that_there_are_and_runs_as_another_user(file, context):
    text = file.read_text(encoding="utf-8")
    project = tomllib.loads((context / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\.\[([a-z,]+)\]", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (program,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.MULTILINE)
    assert Path(program).name in project["scripts"]
    assert text.index("\nRUN ") < text.index("\nUSER 65534\n")
    assert "RUN" not in text.partition("\nUSER ")[2]


def test_set_up_in_an_image_starts_from_nothing_and_finds_what_it_reads(context):
    (command,) = re.findall(
        r"^RUN (make .*)$", (ROOT / "docker" / "cpu.Dockerfile").read_text(), re.MULTILINE
    )
    (target,) = re.findall(r"make (\w+) TORCH_INDEX=\$TORCH_INDEX", command)
    steps = run(context, "make", "--dry-run", target, "TORCH_INDEX=there", f"PYTHON={sys.executable}")
    assert [int(step) for step in re.findall(r"== (\d)/5", steps)] == [1, 2, 3, 4, 5]
    assert "--index-url there" in steps
    for file in re.findall(r"requirements/[a-z]+\.txt|scripts/[a-z_]+\.py", steps):
        assert (context / file).is_file()


def test_what_is_compiled_is_kept_where_the_user_of_an_image_can_write():
    for file in FILES:
        _, _, as_user = file.read_text(encoding="utf-8").partition("\nUSER 65534\n")
        kept = dict(re.findall(r"([A-Z_]+)=(\S+)", as_user))
        assert "NUMBA_CACHE_DIR" in kept
        assert all(folder.startswith("/tmp/") for folder in kept.values())


@pytest.mark.slow
def test_what_is_installed_in_an_image_is_whole_and_starts(context, tmp_path):
    """By the CUDA image's line, without the packages that it would fetch."""
    text = (ROOT / "docker" / "cuda.Dockerfile").read_text(encoding="utf-8")
    (package,) = re.findall(r'^RUN python3 -m pip install "(.*)"$', text, re.MULTILINE)
    there = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(tmp_path))
    run(context, sys.executable, "-m", "pip", "install", *there, package)
    for weights in (ROOT / "epbackend" / "models").glob("*/model.safetensors"):
        assert (tmp_path / weights.relative_to(ROOT)).read_bytes() == weights.read_bytes()
    installed = ("env", f"PYTHONPATH={tmp_path}", sys.executable)
    where = run(tmp_path.parent, *installed, "-c", "import epbackend; print(epbackend.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path)
    program = tmp_path / "bin" / "epbackend"
    assert os.access(program, os.X_OK)
    assert "serve" in run(tmp_path.parent, *installed, str(program), "--help")
