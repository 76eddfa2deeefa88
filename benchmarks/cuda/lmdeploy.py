"""LMDeploy's own Triton layer as a peer, brought along as files: none of the rest of LMDeploy is imported."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from torch import Tensor

from epbackend.kernels import ExpertWeights

MOE = "lmdeploy.pytorch.kernels.cuda.moe"


class LMDeploy:
    """The kernels of an unpacked LMDeploy 0.18 wheel; `folder` holds the package `lmdeploy`."""

    def __init__(self, folder: Path) -> None:
        _pretend_packages(folder.resolve())
        self._half = import_module(f"{MOE}.fused_moe").fused_moe
        self._fp8 = import_module(f"{MOE}.blocked_fp8").fused_moe_blocked_fp8
        self._quantize = import_module("lmdeploy.pytorch.kernels.cuda.blocked_gemm_fp8").quant_fp8

    @classmethod
    def found(cls, folder: Path | None = None) -> LMDeploy | None:
        """In the folder, or in the LMDeploy that is installed here, or none."""
        spec = None if folder else find_spec("lmdeploy")
        if spec and spec.origin:
            folder = Path(spec.origin).parents[1]
        return cls(folder) if folder else None

    def half(
        self,
        hidden_TD: Tensor,
        weights: ExpertWeights,
        weights_TK: Tensor,
        ids_TK: Tensor,
        renormalize: bool = False,
    ) -> Tensor:
        """out_TD: sorts, multiplies, sums."""
        matrices, top_k = (weights.gate_up, weights.down), ids_TK.shape[1]
        return self._half(hidden_TD, *matrices, weights_TK, ids_TK, top_k, renormalize=renormalize)

    def fp8(self, hidden_TD: Tensor, weights: ExpertWeights, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """The same with 128 x 128-block float8; quantizes the tokens first."""
        gate_up, down = weights.gate_up, weights.down
        values_TD, scale_TB = self._quantize(hidden_TD, 128)
        matrices = gate_up.values_LNK, gate_up.scale_LBB, down.values_LNK, down.scale_LBB
        top_k = ids_TK.shape[1]
        return self._fp8(values_TD, scale_TB, *matrices, weights_TK, ids_TK, top_k, out_dtype=hidden_TD.dtype)


def _pretend_packages(folder: Path) -> None:
    """Packages without their `__init__`, which would import all of LMDeploy; and the one thing that is used of it."""
    path = folder
    for part in MOE.split("."):
        path = path / part
        package = ModuleType(".".join(path.relative_to(folder).parts))
        package.__path__ = [str(path)]
        sys.modules[package.__name__] = package
    utils = ModuleType("lmdeploy.utils")
    utils.get_logger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules["lmdeploy.utils"] = utils
