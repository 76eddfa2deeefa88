"""The CPU as a device of LMDeploy: its default operators, with our attention, sampling and experts."""

from __future__ import annotations

from typing import Any

import torch
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.default import DefaultOpsBackend
from lmdeploy.pytorch.backends.graph_runner import GraphRunner
from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingBuildSpec
from lmdeploy.pytorch.devices import DeviceContext, get_device_manager

from epbackend.engines.lmdeploy.attention import PagedAttention
from epbackend.engines.lmdeploy.attention_plan import AttentionPlan, plan_attention
from epbackend.engines.lmdeploy.backends.experts import OurExperts
from epbackend.engines.lmdeploy.sampling import SeededMultinomial


class EagerRunner(GraphRunner):
    """Runs the model as it is: a CPU captures no graphs, so there are no batch sizes to warm up."""

    def get_capture_batch_sizes(self) -> list[int]:
        return []


class CpuBackend(OurExperts, DefaultOpsBackend):
    """What LMDeploy asks of a device."""

    @staticmethod
    def get_name() -> str:
        return "cpu"

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        if isinstance(spec, PagedAttentionBuildSpec):
            return PagedAttention(spec)
        if isinstance(spec, MultinomialSamplingBuildSpec):
            return SeededMultinomial()
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
        return "gloo"

    @staticmethod
    def support_ray() -> bool:
        return True
