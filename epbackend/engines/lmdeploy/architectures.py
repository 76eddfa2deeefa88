"""Which models LMDeploy has, and which of them a device lacks operators for: from config.json alone."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from epbackend.engines.lmdeploy.model_forms import RENAMED
from epbackend.engines.lmdeploy.patching import LMDEPLOY_VERSION

_SPARSE_INDEX = (
    "its sparse attention, where an index chooses the keys, has operators for GPUs only (flash_mla)"
)
_BLOCKWISE = "it writes blocks of tokens at once, and attention with such masks has operators for GPUs only"
LACKING: dict[str, dict[str, str]] = {
    "cpu": {
        "DeepseekV32ForCausalLM": _SPARSE_INDEX,
        "GlmMoeDsaForCausalLM": _SPARSE_INDEX,
        "DeepseekV4ForCausalLM": "its compressed attention and its FP4 experts have operators for GPUs only",
        "SDARMoeForCausalLM": _BLOCKWISE,
        "SDARForCausalLM": _BLOCKWISE,
    }
}
"""device -> architecture -> why it is not served there."""


def architecture(settings: Mapping[str, Any]) -> str | None:
    """The architecture that LMDeploy serves a config.json as; None where it names none."""
    mapped = (settings.get("auto_map") or {}).get("AutoModelForCausalLM")
    if mapped:
        return mapped.rpartition(".")[2]
    named = [RENAMED.get(name, name) for name in settings.get("architectures") or []]
    return next((name for name in named if name in served()), next(iter(named), None))


def why_not(settings: Mapping[str, Any], device: str) -> str | None:
    """Why a model cannot be served on a device, and what to do; None where nothing is known against it."""
    name = architecture(settings)
    if name is None:
        return None
    if name not in served():
        return (
            f"LMDeploy {LMDEPLOY_VERSION}'s PyTorch engine has no {name}; it serves those in docs/lmdeploy.md"
        )
    if reason := LACKING.get(device, {}).get(name):
        return f"device: {device} cannot run {name}: {reason}; use a GPU (device: cuda)"
    return None


@cache
def served() -> frozenset[str]:
    """The architectures of LMDeploy's PyTorch engine."""
    package = find_spec("lmdeploy")
    assert package  # its version was checked
    assert package.origin
    # The file is a table that imports nothing; the package around it imports torch.
    table = Path(package.origin).parent / "pytorch" / "models" / "module_map.py"
    return frozenset(runpy.run_path(str(table))["MODULE_MAP"])
