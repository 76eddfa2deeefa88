"""LMDeploy's Ascend backend, which is dlinfer's, with our experts and DeepSeek-V3's router in one operator."""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.dlinfer.ascend import AscendOpsBackend
from lmdeploy.pytorch.backends.dlinfer.ascend.op_backend import DistMeta
from lmdeploy.pytorch.backends.graph_runner import GraphRunner
from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec

from epbackend.engines.lmdeploy.operators import ExpertsMixin, NpuRouter


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

    @staticmethod
    def build_graph_runner(model: Any, **kwargs: Any) -> GraphRunner:
        """LMDeploy's runner without captured graphs: the engine is eager here, and dlinfer's has other arguments."""
        return GraphRunner(model, **kwargs)
