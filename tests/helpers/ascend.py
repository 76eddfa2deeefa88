"""The ascend device: on real NPUs, or on the emulated CANN (`cann/`).

`--ascend` says on which (see `tests/conftest.py`); without it these tests skip, as torch_npu changes the torch of the
whole process and belongs into a run of its own (`make test-ascend`).
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.helpers import cann

REAL = "npu"
PLATFORMS = ("A3", "A2", REAL)
"""The emulated chip, or real NPUs."""

DEVICES = 4

ROOT = Path(__file__).parents[2]
MARK = "EMULATED_NPUS"
"""Variable that says which NPUs a process and its children have; see emulated_npu/sitecustomize.py."""


def missing(platform: str) -> str | None:
    """Why the tests cannot run on a platform; None if they can."""
    return None if platform == REAL else cann.missing()


def outside() -> dict[str, str]:
    """This process's environment, without what an emulation set in it: as a user has it."""
    return {name: value for name, value in os.environ.items() if name not in (MARK, cann.AUTOLOAD)}


def environment(chip: str, devices: int) -> dict[str, str]:
    """Variables with which Python finds emulated NPUs, torch-npu and dlinfer, as it finds real ones where those are."""
    folders = [ROOT / "tests" / "helpers" / "emulated_npu", ROOT, cann.WHEEL]
    path = [*map(str, folders), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        MARK: f"{chip}:{devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",  # ranks share the cores
        "LMDEPLOY_SKIP_WARMUP": "1",
    }


def start(platform: str, rank: int = 0) -> None:
    """Make torch.npu work in this process, its current device being the rank's own."""
    import torch  # which tests without NPUs need not load

    if platform == REAL:
        if find_spec("torch_npu") is None:
            sys.path.append(str(cann.WHEEL))
        importlib.import_module("torch_npu")
    else:
        # By a module's import, so that ranks, which are forked from a process that made it too, need not again.
        os.environ[MARK] = f"{platform}:{DEVICES}"
        importlib.import_module("tests.helpers.emulated_npus")
    torch.get_device_module("npu").set_device(rank)
