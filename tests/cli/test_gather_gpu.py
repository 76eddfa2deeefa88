"""scripts/gather_gpu.py: what it lists, packs and refuses. Nothing is downloaded here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

SCRIPTS = Path(__file__).parents[2] / "scripts"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def gather_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gather_gpu

    return gather_gpu


@pytest.fixture
def offline(gather_gpu, monkeypatch):
    """The wheels of the network are left out, and the checkout."""
    monkeypatch.setattr(gather_gpu, "download", lambda packages, python, wheels: None)
    monkeypatch.setattr(gather_gpu, "copy_checkout", lambda target: target.mkdir())
    return gather_gpu


def unpack(folder: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(folder / "unpack.py"), str(site)]
    return subprocess.run(command, capture_output=True, text=True)


def test_packages_that_the_machine_has_are_not_gathered(gather_gpu):
    found = gather_gpu.wanted("3.12", gather_gpu.THERE, [])
    assert {"pydantic-core", "xgrammar", "apache-tvm-ffi", "pytest", "pytest-xdist", "execnet"} <= set(found)
    assert not {"torch", "triton", "transformers", "numpy", "tokenizers", "sympy", "lmdeploy"} & set(found)


def test_extra_packages_bring_their_dependencies(gather_gpu):
    found = gather_gpu.wanted("3.12", ["torch", "triton"], ["transformers"])
    assert {"transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy"} <= set(found)
    assert not {"torch", "triton", "sympy"} & set(found)


ONLY = """
import sys
from importlib.machinery import PathFinder

class Only:
    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches

    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Only if each is PathFinder else each for each in sys.meta_path]
import epbackend
epbackend.enable(epbackend.EPConfig.load({{"device": "cuda"}}))
import lmdeploy.pytorch.engine.engine, lmdeploy.serve.core.async_engine  # all that a pipeline imports
"""


def test_what_the_plug_imports_is_gathered(gather_gpu):
    """It is switched on where there is nothing but what the machine has and what was gathered."""
    there = {
        *gather_gpu.wanted(HERE, gather_gpu.THERE, []),
        *gather_gpu.wanted(HERE, [], gather_gpu.THERE),
        "lmdeploy",
        "epbackend",
    }
    hidden = {
        module
        for module, brought_by in packages_distributions().items()
        if not there & set(map(canonicalize_name, brought_by))
    }
    assert {"numba", "ray", "typer", "matplotlib"} & hidden
    code = ONLY.format(hidden=hidden)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_lmdeploy_is_packed_without_compiled_files(offline, tmp_path):
    offline.gather(tmp_path / "gpu", HERE, list(offline.THERE), [])
    done = unpack(tmp_path / "gpu", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert not [file for file in (tmp_path / "site").rglob("*") if file.suffix in (".so", ".a")]
    code = "import lmdeploy, importlib.metadata as m; print(lmdeploy.__file__, m.version('lmdeploy'))"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.stdout.split() == [str(tmp_path / "site/lmdeploy/__init__.py"), "0.18.0"], shown.stderr


def test_a_checkout_comes_before_the_gathered_one(offline, tmp_path):
    offline.gather(tmp_path / "gpu", HERE, [], [])
    mine = tmp_path / "checkout"
    (mine / "epbackend/engines").mkdir(parents=True)

    def path_in(folder: Path) -> list[str]:
        command = f". {tmp_path}/gpu/activate.sh && echo $PYTHONPATH"
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": "/before"}
        shown = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, env=environment
        )
        return shown.stdout.strip().split(":")

    site = str(tmp_path / "gpu/site")
    assert path_in(mine) == [str(mine), site, "/before"]
    assert path_in(tmp_path) == [str(tmp_path / "gpu/epbackend"), site, "/before"]


def test_unpacking_refuses_a_folder_for_another_python(offline, tmp_path):
    offline.gather(tmp_path / "gpu", "3.99", [], [])
    assert f"for Python 3.99, and this is {HERE}" in unpack(tmp_path / "gpu", tmp_path / "site").stderr
    assert not (tmp_path / "site").exists()


def test_unpacking_names_the_packages_that_the_machine_lacks(offline, tmp_path):
    offline.gather(tmp_path / "gpu", HERE, ["torch", "no-such-package"], [])
    refused = unpack(tmp_path / "gpu", tmp_path / "site").stderr
    assert "not installed here: no-such-package; gather with --with no-such-package" in refused


def test_folder_over_the_limit_is_refused(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "gpu"), "--limit-mb", "0.5"])
    assert "--limit-mb is 0.5. The largest: lmdeploy-0.18.0-py3-none-any.whl" in offline.main()


def test_folder_that_holds_other_files_is_left_alone(offline, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    assert "was not made by this script" in offline.main()
    assert (tmp_path / "mine").exists()


def test_folder_lists_what_was_gathered(offline, tmp_path):
    offline.gather(tmp_path / "gpu", "3.12", list(offline.THERE), ["numpy"])
    facts = json.loads((tmp_path / "gpu" / "gathered.json").read_text())
    assert facts["there"] == ["torch", "transformers", "triton"]
    assert "numpy" in facts["wheels"]
