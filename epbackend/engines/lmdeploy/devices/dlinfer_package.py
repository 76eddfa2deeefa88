"""The dlinfer package below LMDeploy's Ascend backend: which one is there, and what LMDeploy asks of it in vain.

LMDeploy 0.18.0 was written beside a dlinfer that no package index has; the newest there, 0.2.7, belongs to an older
LMDeploy. What it lacks is read from its source: importing dlinfer changes torch for the whole process.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

from epbackend.errors import UnavailableError

PACKAGE = "dlinfer-ascend"
OLDEST = "0.2.7"
"""What older ones have was not looked at; what newer ones have is read from them."""
REMEDY = f"pip install --no-deps {PACKAGE}=={OLDEST} (Python 3.10 or 3.11)"

RUNTIME = "dlinfer.vendor.ascend.version"
"""Came with the dlinfer of LMDeploy 0.18."""

EXTENSIONS = "dlinfer.framework.lmdeploy_ext.device"
"""What dlinfer changes in LMDeploy when it is imported."""


@dataclass(frozen=True)
class Gap:
    """Something that LMDeploy 0.18.0 calls and a dlinfer may not have."""

    module: str
    """File inside the package."""
    function: str | None
    argument: str | None
    bridged: bool
    follows: str
    """What that means, with the bridge where there is one."""

    @property
    def name(self) -> str:
        parts = [self.function or self.module, f"({self.argument})" if self.argument else ""]
        return "".join(parts)


_OPS = "ops/llm.py"
GAPS = {
    "runtime": Gap(
        "vendor/ascend/version.py",
        None,
        None,
        True,
        "it starts without its check of versions, and its changes to an older LMDeploy stay out",
    ),
    "attention": Gap(
        _OPS,
        "prefill_attention",
        "actual_seq_lengths_cpu",
        True,
        "prefill calls npu_fused_infer_attention_score itself, once for each request; MLA and decode give dlinfer its "
        "older arguments, and decode takes one token a request",
    ),
    "moe w8a8": Gap(_OPS, "fused_moe_w8a8", None, True, "epbackend's experts stand in its place"),
    "static w8a8": Gap(
        _OPS, "linear_w8a8_static", None, False, "W8A8 checkpoints with static activation scales do not run"
    ),
    "interleaved rotary": Gap(
        _OPS,
        "apply_rotary_pos_emb_interleaved",
        None,
        False,
        "models with interleaved rotary pairs do not run",
    ),
    "indexer": Gap(
        _OPS, "lightning_indexer", None, False, "models with sparse attention (DeepSeek-V3.2) do not run"
    ),
}


def installed() -> str | None:
    """The version that is there."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def check_version() -> None:
    """Raises UnavailableError for one that is older than those LMDeploy's calls were held against."""
    version = installed()
    if version is not None and Version(version) < Version(OLDEST):
        raise UnavailableError(
            f"device ascend needs {PACKAGE} {OLDEST} or newer, and {version} is installed: {REMEDY}"
        )


def lacks(name: str) -> bool:
    """Whether the dlinfer that is there has this gap.

    Raises:
        UnavailableError: there is no dlinfer.
    """
    gap, functions = GAPS[name], _functions()
    if gap.function is None:
        return not (_folder() / gap.module).exists()
    return gap.function not in functions or (
        gap.argument is not None and gap.argument not in functions[gap.function]
    )


@cache
def load() -> None:
    """Import dlinfer, without what it would change in LMDeploy where that is meant for an older one.

    Raises:
        UnavailableError: there is none, it is too old, or it cannot be imported.
    """
    check_version()
    outdated = lacks("runtime")
    try:
        if outdated:
            sys.modules.setdefault(EXTENSIONS, ModuleType(EXTENSIONS))
        import_module("dlinfer.ops")
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            f"dlinfer cannot be imported ({type(error).__name__}: {error}); it needs torch-npu, CANN and its NNAL "
            f"package (source both set_env.sh), and {REMEDY}"
        ) from error


@contextmanager
def placeholder(module: str, **attributes: Any) -> Iterator[None]:
    """For its time there is a module of that name with these attributes."""
    sys.modules[module] = made = ModuleType(module)
    vars(made).update(attributes)
    try:
        yield
    finally:
        del sys.modules[module]


def _folder() -> Path:
    spec = find_spec("dlinfer") if "dlinfer" not in sys.modules else sys.modules["dlinfer"].__spec__
    if spec is None or spec.origin is None:
        raise UnavailableError(f"device ascend needs dlinfer, which is not installed: {REMEDY}")
    return Path(spec.origin).parent


@cache
def _functions() -> dict[str, list[str]]:
    """Its operators, and the names of their arguments."""
    source = (_folder() / _OPS).read_text()
    return {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
