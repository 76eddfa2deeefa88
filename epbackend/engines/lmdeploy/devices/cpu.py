"""The CPU as a device of LMDeploy: its default operators with our attention, sampling and experts.

Letters of its own: B sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lmdeploy.pytorch.backends.apply_rotary_emb import ApplyRotaryEmbBuildSpec
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.causal_conv1d import CausalConv1dBuildSpec
from lmdeploy.pytorch.backends.default import DefaultOpsBackend
from lmdeploy.pytorch.backends.default.apply_rotary_emb import DefaultApplyRotaryEmbImpl
from lmdeploy.pytorch.backends.gated_delta_rule import GatedDeltaMetaBuildSpec, GatedDeltaRuleBuildSpec
from lmdeploy.pytorch.backends.graph_runner import GraphRunner
from lmdeploy.pytorch.backends.multinomial_sampling import (
    MultinomialSamplingBuildSpec,
    MultinomialSamplingImpl,
)
from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
from torch import Tensor

from epbackend.device.cpu import CpuDevice
from epbackend.engines.lmdeploy.devices.cpu_attention import AttentionPlan, PagedAttention, plan_attention
from epbackend.engines.lmdeploy.devices.cpu_delta_rule import CausalConv, DeltaMeta, DeltaRule
from epbackend.engines.lmdeploy.operators import ExpertsMixin


class EagerRunner(GraphRunner):
    """Runs the model as it is: a CPU captures no graphs, so there are no batch sizes to warm up."""

    def get_capture_batch_sizes(self) -> list[int]:
        return []


class CpuBackend(ExpertsMixin, DefaultOpsBackend):
    """What LMDeploy asks of a device."""

    @staticmethod
    def get_name() -> str:
        return "cpu"

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        if isinstance(spec, PagedAttentionBuildSpec):
            return PagedAttention(spec)
        if (operator := OPERATORS.get(type(spec))) is not None:
            return operator()
        return super().build_op(spec, enable_deterministic=enable_deterministic)

    @staticmethod
    def get_attention_metadata_cls() -> type[AttentionPlan]:
        return AttentionPlan

    @classmethod
    def update_step_context(cls, step_context: Any) -> Any:
        step_context.attn_metadata = plan_attention(step_context)
        return step_context

    @staticmethod
    def build_graph_runner(
        model: torch.nn.Module,
        model_config: Any,
        cache_config: Any,
        backend_config: Any,
        device: torch.device,
    ) -> EagerRunner:
        return EagerRunner(model, model_config, cache_config, backend_config, device)

    @staticmethod
    def init() -> None:
        # A worker sets up its process group before any device context is entered, so the base context is the CPU.
        get_device_manager().set_context(DeviceContext("cpu"))

    @staticmethod
    def ccl_backend() -> str:
        return CpuDevice().collective_backend

    @staticmethod
    def support_ray() -> bool:
        return True


class SeededMultinomial(MultinomialSamplingImpl):
    """Draws by the inverse of the cumulative distribution; LMDeploy's default ignores the seeds."""

    def forward(
        self, scores: Tensor, seeds: Tensor, offsets: Tensor, indices: Tensor | None = None
    ) -> Tensor:
        """One token of each row: scores [B, V] (probabilities up to a factor), seeds and offsets [B] -> ids [B]."""
        cumulative_BV = scores.double().cumsum(dim=-1)
        threshold_B1 = uniform(seeds, offsets)[:, None] * cumulative_BV[:, -1:]
        column_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp_(
            max=scores.shape[1] - 1
        )
        chosen = column_B1 if indices is None else indices.gather(1, column_B1)
        return chosen.view(-1)


class PartialRotary(DefaultApplyRotaryEmbImpl):
    """Rotates the first numbers of each head where the tables are narrower than it; LMDeploy's default wants all."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        inplace: bool = True,
        complex_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """query [T, H, D], key [T, G, D], cos and sin [T, rotated] -> query and key."""
        width, dim = cos.shape[-1], query.shape[-1]
        if complex_mode or width == dim:
            return super().forward(query, key, cos, sin, inplace, complex_mode)
        if not inplace:
            query, key = query.clone(), key.clone()
        super().forward(query[..., :width], key[..., :width], cos, sin, inplace=True)
        return query, key


def uniform(seeds: Tensor, offsets: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, offset), float64: SplitMix64 (Steele, Lea, Flood 2014) as a hash of both."""
    with np.errstate(over="ignore"):
        state = _mix(seeds.numpy().astype(np.uint64)) + offsets.numpy().astype(np.uint64)
        bits = _mix(state)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


OPERATORS: dict[type, type] = {
    ApplyRotaryEmbBuildSpec: PartialRotary,
    CausalConv1dBuildSpec: CausalConv,
    GatedDeltaMetaBuildSpec: DeltaMeta,
    GatedDeltaRuleBuildSpec: DeltaRule,
    MultinomialSamplingBuildSpec: SeededMultinomial,
}
"""What LMDeploy asks for -> ours, where its default lacks it or is wrong."""


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
