"""LMDeploy's CUDA backend with our experts, also where it captures prefill in pieces.

With `piecewise_cudagraph_max_tokens` set, the experts of a layer run between two captured pieces, since in prefill the
host decides how rows travel. They get the tokens of the batch without those that pad it to the size of its graph.
"""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.cuda import CudaOpsBackend
from lmdeploy.pytorch.backends.cuda.graph_runner.piecewise import (
    ViewTolerantPaddedAdapter,
    eager_boundary,
    get_piecewise_graph_execution,
)
from lmdeploy.pytorch.backends.cuda.step_metadata import register_piecewise_graph_impl
from lmdeploy.pytorch.models.utils.cudagraph import CudaGraphMixin
from torch import Tensor, nn

from epbackend.engines.lmdeploy.operators import ExpertsMixin, LayerExperts
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError


class CudaBackend(ExpertsMixin, CudaOpsBackend):
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


class ExpertsBetweenGraphs:
    """What LMDeploy asks about an operator before it captures in pieces."""

    def __init__(self, experts: LayerExperts) -> None:
        self._experts = experts

    def supports_piecewise_cuda_graph(self) -> bool:
        return True

    def enable_piecewise_cuda_graph(self) -> None:
        """From now on the operator is a boundary between captured pieces."""
        compute = self._experts.forward

        # The output goes only to the piece that follows at once.
        @eager_boundary(adapter_factory=ViewTolerantPaddedAdapter, reuse_bridge_after_next_step=True)
        def between(hidden_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
            pieces = get_piecewise_graph_execution()
            tokens = slice(pieces.raw_tokens if pieces else None)
            return compute(hidden_TD[tokens], topk_weights_TK[tokens], topk_ids_TK[tokens])

        def forward(
            hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *packed: Any, **extras: Any
        ) -> Tensor:
            return between(hidden_states, topk_weights, topk_ids)

        self._experts.forward = forward  # type: ignore[method-assign]
