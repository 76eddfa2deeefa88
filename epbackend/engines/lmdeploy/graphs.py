"""Our experts where LMDeploy captures prefill in pieces (`piecewise_cudagraph_max_tokens`).

How rows travel in prefill is decided by the host, so the experts of a layer run between two captured pieces, on the
tokens of the batch alone, without those that fill up its graph.
"""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.cuda.graph_runner.piecewise import (
    ViewTolerantPaddedAdapter,
    eager_boundary,
    get_piecewise_graph_execution,
)
from torch import Tensor

from epbackend.engines.lmdeploy.moe import LayerExperts


class ExpertsBetweenGraphs:
    """What LMDeploy asks about an operator before it captures in pieces."""

    def __init__(self, experts: LayerExperts) -> None:
        self._experts = experts

    def supports_piecewise_cuda_graph(self) -> bool:
        return True

    def enable_piecewise_cuda_graph(self) -> None:
        """From now on the operator is a boundary between captured pieces."""
        compute = self._experts.forward

        # The output goes to the piece that follows at once, and to nobody else.
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
