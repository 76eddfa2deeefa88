"""LMDeploy's Ascend backend, which is dlinfer's, with our experts and DeepSeek-V3's router in one operator."""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.dlinfer.ascend import AscendOpsBackend
from lmdeploy.pytorch.backends.dlinfer.ascend.op_backend import DistMeta
from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec, RouterNoauxTCImpl
from torch import Tensor

from epbackend.engines.lmdeploy.operators import ExpertsMixin
from epbackend.kernels.npu import ops


class AscendBackend(ExpertsMixin, AscendOpsBackend):
    """dlinfer is told that each rank is alone, as far as experts go.

    Told the truth, it would gather the ranks' numbers of tokens in each step and wait for them, and its router would
    choose experts for a rank's own part of an attention group's tokens only: what its own experts want, and ours not.
    """

    dist_meta = DistMeta(dp_size=1, tp_size=1, ep_size=1, tp_rank=0, ep_rank=0, tp_group=None, ep_group=None)

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        if isinstance(spec, RouterNoauxTCBuildSpec) and NpuRouter.fits(spec):
            return NpuRouter(spec)
        return super().build_op(spec, enable_deterministic=enable_deterministic)


class NpuRouter(RouterNoauxTCImpl):
    """All of it in one operator."""

    def __init__(self, spec: RouterNoauxTCBuildSpec) -> None:
        self._spec = spec

    @staticmethod
    def fits(spec: RouterNoauxTCBuildSpec) -> bool:
        """Whether the operator computes what is asked for."""
        as_published = spec.scoring_func == "sigmoid" and spec.renormalize and spec.router_n_groups <= 0
        return as_published and ops.router_fits(
            spec.n_routed_experts, spec.top_k, spec.n_group, spec.top_k_group
        )

    def forward(self, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(weights_TK, ids_TK) for logits_TE and the correction's bias_E."""
        spec = self._spec
        return ops.sigmoid_top_k(
            logits, bias, spec.top_k, spec.n_group, spec.top_k_group, spec.routed_scaling_factor
        )
