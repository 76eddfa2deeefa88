"""Layers of LMDeploy's models that go wrong with experts spread over ranks, on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.patching import patch


@patch(
    "lmdeploy.pytorch.models.deepseek_v2:DeepseekV2MoE.__init__",
    why="with dp 1 it sums the routed experts' output over all ranks, though each rank has the whole sum already",
    when="ep",
    fingerprint="f0e43633d5f1",
)
def deepseek_sums_once(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._all_reduce:
            # What is left to sum: the shared experts, where tensor parallelism cut them.
            self._all_reduce = False
            if self.shared_experts is not None and self.shared_experts.down_proj.tp > 1:
                self.shared_experts.down_proj.all_reduce = True

    return init


@patch(
    "lmdeploy.pytorch.nn.moe.default:FusedMoE.update_weights",
    why="the operator packs its weights here, and gets the biases and the activation only with each call",
    when="always",
    fingerprint="7d6c1d80a2b5",
)
def experts_get_their_biases(original: Callable) -> Callable:
    def update_weights(self: Any) -> None:
        from epbackend.engines.lmdeploy.moe import ExpertParallelFusedMoE

        if isinstance(self.impl, ExpertParallelFusedMoE):
            self.impl.set_extras(self.gate_up.bias, self.down.bias, self.act_func)
        original(self)

    return update_weights
