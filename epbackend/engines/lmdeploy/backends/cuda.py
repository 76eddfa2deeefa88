"""LMDeploy's CUDA backend with our experts."""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.cuda import CudaOpsBackend
from lmdeploy.pytorch.backends.cuda.step_metadata import register_piecewise_graph_impl
from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin
from torch import nn

from epbackend.engines.lmdeploy.backends.experts import OurExperts
from epbackend.engines.lmdeploy.graphs import ExpertsBetweenGraphs
from epbackend.engines.lmdeploy.moe import LayerExperts
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError


class CudaBackend(OurExperts, CudaOpsBackend):
    """Decoding is captured whole, our experts in it; where prefill is captured in pieces, they stand between two."""

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        operator = super().build_op(spec, enable_deterministic=enable_deterministic)
        if isinstance(operator, LayerExperts):
            register_piecewise_graph_impl(ExpertsBetweenGraphs(operator))
        return operator

    @staticmethod
    def build_graph_runner(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Raises ConfigError for a model whose decoding LMDeploy cannot capture, and so does not fill up alike."""
        config = active().config
        if config.engine.dp > 1 and config.captures_graphs and not isinstance(model, CudaGraphMixin):
            raise ConfigError(
                f"engine.eager_mode: LMDeploy captures no graphs of {type(model).__name__}, and with dp > 1 the ranks' "
                "batches would differ where they have to be equal; set engine.eager_mode: true"
            )
        return CudaOpsBackend.build_graph_runner(model, *args, **kwargs)
