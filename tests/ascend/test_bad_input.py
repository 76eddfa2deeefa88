"""What is missing or wrong on device ascend, as the command says it: reason and remedy, before weights are loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")

from epbackend.models import resolve
from tests.helpers import ascend
from tests.helpers.cann import WHEEL
from tests.helpers.patience import PATIENCE_S

pytestmark = pytest.mark.ascend

QWEN = "tiny-qwen3-moe"


@pytest.fixture(autouse=True)
def _emulated(npu):
    if npu == ascend.REAL:
        pytest.skip("a machine with NPUs lacks none of this")


def epbackend(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, with these variables."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "epbackend", *arguments],
        cwd=ascend.ROOT,
        env=ascend.outside() | {"COLUMNS": "500"} | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def refusal(model: str, *arguments: str, **variables: str) -> str:
    """What `epbackend generate` says before it starts anything."""
    done = epbackend("generate", model, "-p", "hello", "--device", "ascend", *arguments, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Loading weights" not in done.stderr
    return done.stderr


def with_torch_npu() -> dict[str, str]:
    return {"PYTHONPATH": f"{ascend.ROOT}{os.pathsep}{WHEEL}"}


def without_dlinfer(folder: Path) -> Path:
    """A folder with torch-npu alone."""
    for each in WHEEL.iterdir():
        if not each.name.startswith("dlinfer"):
            (folder / each.name).symlink_to(each)
    return folder


def emulated_with(folder: Path) -> dict[str, str]:
    """One emulated NPU, with the packages of this folder."""
    variables = ascend.environment("A3", 1)
    return variables | {"PYTHONPATH": variables["PYTHONPATH"].replace(str(WHEEL), str(folder))}


def with_another_version(folder: Path, package: str, version: str) -> Path:
    """A folder like the one with torch-npu and dlinfer, in which the package says that it has this version."""
    for each in WHEEL.iterdir():
        if each.name.startswith(f"{package}-"):
            said = (each / "METADATA").read_text()
            made = folder / f"{package}-{version}.dist-info"
            made.mkdir()
            (made / "METADATA").write_text(re.sub(r"(?m)^Version: .*", f"Version: {version}", said, count=1))
        else:
            (folder / each.name).symlink_to(each)
    return folder


def awq_checkpoint(folder: Path) -> str:
    shutil.copytree(resolve(QWEN), folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def test_without_cann_the_loaders_error_is_explained():
    said = refusal(QWEN, **with_torch_npu())
    assert "torch-npu cannot be loaded (lib" in said
    assert "source CANN's set_env.sh and take the torch-npu that fits torch" in said


@pytest.mark.slow  # the reason is the one of the test above
def test_doctor_names_what_is_missing_where_cann_is():
    done = epbackend("doctor", "--json", **with_torch_npu())
    assert done.returncode == 0, "other devices can be used"
    said = json.loads(done.stdout)["devices"]["ascend"]
    assert not said["usable"]
    assert "source CANN's set_env.sh" in said["reason"]


@pytest.mark.slow
def test_without_torch_npu():
    said = refusal(QWEN, PYTHONPATH=str(ascend.ROOT))
    assert "torch-npu is not installed; install CANN and epbackend[ascend]" in said


@pytest.mark.slow
def test_without_dlinfer(tmp_path):
    said = refusal(QWEN, **emulated_with(without_dlinfer(tmp_path)))
    assert (
        "device ascend needs dlinfer, which is not installed: pip install --no-deps dlinfer-ascend==0.2.7"
        in said
    )


def test_torch_npu_of_another_torch(tmp_path):
    folder = with_another_version(tmp_path, "torch_npu", "2.12.0")
    said = refusal(QWEN, PYTHONPATH=f"{ascend.ROOT}{os.pathsep}{folder}")
    assert f"torch-npu 2.12.0 is for torch 2.12, and torch is {torch.__version__}" in said
    assert "pip install 'torch-npu==2.13.*'" in said


@pytest.mark.slow
def test_an_older_dlinfer(tmp_path):
    said = refusal(QWEN, **emulated_with(with_another_version(tmp_path, "dlinfer_ascend", "0.2.6")))
    assert "device ascend needs dlinfer-ascend 0.2.7 or newer, and 0.2.6 is installed: pip install" in said


@pytest.mark.slow
def test_a_chip_that_is_neither_a2_nor_a3():
    said = refusal(QWEN, **ascend.environment("310P", 1))
    assert "device ascend is for the chips A2 and A3, and this one is Ascend310P3" in said


@pytest.mark.slow
def test_more_ranks_than_devices():
    said = refusal(QWEN, "--ep-size", "2", **ascend.environment("A3", 1))
    assert "ep_size: 2 takes 2 NPUs, and there are 1" in said


@pytest.mark.slow
def test_npus_that_ray_does_not_know(tmp_path):
    """Its own search for them looks for files in /dev; LMDeploy would wait for half an hour."""
    (config := tmp_path / "config.yaml").write_text("ep_size: 2\nengine: {executor: ray}\n")
    said = refusal(QWEN, "--config", str(config), **ascend.environment("A3", 2))
    assert "an engine's 2 ranks take 2 NPU, and Ray has found 0: start it with them before (ray start" in said


@pytest.mark.slow
def test_experts_in_a_form_that_nobody_computes(tmp_path):
    said = refusal(awq_checkpoint(tmp_path), **ascend.environment("A3", 1))
    assert "computes awq experts there; take a checkpoint that is unquantized or W8A8" in said
