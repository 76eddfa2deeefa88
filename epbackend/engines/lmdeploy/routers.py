"""The router of DeepSeek-V3 on Ascend, where LMDeploy has its default one: a dozen operators of torch."""

from __future__ import annotations

from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec, RouterNoauxTCImpl
from torch import Tensor

from epbackend.kernels.npu import ops


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
