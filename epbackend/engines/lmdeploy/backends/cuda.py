"""LMDeploy's CUDA backend with our experts."""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.cuda import CudaOpsBackend
from lmdeploy.pytorch.backends.cuda.step_metadata import register_piecewise_graph_impl

from epbackend.engines.lmdeploy.backends.experts import OurExperts
from epbackend.engines.lmdeploy.graphs import ExpertsBetweenGraphs
from epbackend.engines.lmdeploy.moe import LayerExperts


class CudaBackend(OurExperts, CudaOpsBackend):
    """Decoding is captured whole, our experts in it; where prefill is captured in pieces, they stand between two."""

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        operator = super().build_op(spec, enable_deterministic=enable_deterministic)
        if isinstance(operator, LayerExperts):
            register_piecewise_graph_impl(ExpertsBetweenGraphs(operator))
        return operator
