"""Our operators for LMDeploy's MoE layers: one for each form of weights that can be spread, and a router for NPUs.

The letters of shapes are those of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from lmdeploy.pytorch.backends.base import BuildSpec, ImplT
from lmdeploy.pytorch.backends.moe import (
    FusedMoEBlockedF8BuildSpec,
    FusedMoEBlockedF8Impl,
    FusedMoEBuildSpec,
    FusedMoEImpl,
    FusedMoEStaticF8BuildSpec,
    FusedMoEV4FP4BuildSpec,
    FusedMoEW4A16BuildSpec,
    FusedMoEW8A8BuildSpec,
    FusedMoEW8A8Impl,
)
from lmdeploy.pytorch.backends.moe_router import RouterNoauxTCBuildSpec, RouterNoauxTCImpl
from lmdeploy.pytorch.distributed import get_dist_manager
from lmdeploy.pytorch.model_inputs import get_step_ctx_manager
from lmdeploy.pytorch.models.patch import get_build_model_context
from torch import Tensor

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.engines.lmdeploy import balance
from epbackend.engines.lmdeploy.load.report import check_room
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.placement import slot_map_of
from epbackend.errors import ConfigError, EPError, UnavailableError
from epbackend.kernels.fp8 import BLOCK, FP8, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.npu import ops
from epbackend.kernels.weight_formats import Experts
from epbackend.moe import ExpertParallelMoE
from epbackend.names import PHASES

Spec: TypeAlias = FusedMoEBuildSpec | FusedMoEBlockedF8BuildSpec | FusedMoEW8A8BuildSpec


NOT_SPREAD: dict[type[BuildSpec], str] = {
    FusedMoEStaticF8BuildSpec: "FP8 with one scale a tensor",
    FusedMoEW4A16BuildSpec: "4-bit integers (W4A16)",
    FusedMoEV4FP4BuildSpec: "4-bit floats (DeepSeek-V4)",
}
"""Forms of experts that only LMDeploy itself can compute, every rank all of them."""


_building: ContextVar[int | None] = ContextVar("building_layer", default=None)


class ExpertsMixin:
    """For a backend of LMDeploy, named first among the bases: experts are ours, all other operators the backend's."""

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        """Raises ConfigError for experts in a form that cannot be spread over ranks."""
        experts = expert_operator(spec, device=cls.get_name())  # type: ignore[attr-defined]
        return experts or super().build_op(spec, enable_deterministic=enable_deterministic)  # type: ignore[misc]


def expert_operator(spec: BuildSpec, device: str) -> LayerExperts | None:
    """Our operator for what LMDeploy asks for; None where that is no layer of experts, or one for LMDeploy itself.

    Raises ConfigError for experts in a form that cannot be spread over ranks.
    """
    if isinstance(spec, FusedMoEBuildSpec):
        return FloatExperts(spec, device)
    if isinstance(spec, FusedMoEBlockedF8BuildSpec):
        return BlockedF8Experts(spec, device)
    if isinstance(spec, FusedMoEW8A8BuildSpec):
        return W8A8Experts(spec, device)
    ep_size = active().config.ep_size
    if type(spec) in NOT_SPREAD and ep_size > 1:
        raise ConfigError(
            f"ep_size: {ep_size}, but this model's experts are {NOT_SPREAD[type(spec)]}, which cannot be spread; use "
            "ep_size: 1 (and engine.tp), or a checkpoint in bfloat16, blocked FP8 or W8A8"
        )
    return None


class LayerExperts:
    """What the operators of all forms of weights share. LMDeploy loads `ep_expert_list`, this computes them.

    LMDeploy's part: routing, the shared experts, and with ep_size 1 and tp > 1 the sum over the shards of each expert.
    """

    def __init__(self, spec: Spec, device: str) -> None:
        config = active().config
        self.spec, self.device = spec, device
        self.layer_number = layer_being_built(getattr(spec, "layer_idx", None))
        self.ranks = _ranks(spec)
        self.slot_map = slot_map_of(active().placement, self.layer_number, spec.num_experts, self.ranks.size)
        self.settings = {
            "prefill": config.dispatch_settings("prefill"),
            "decode": _bounded(config.dispatch_settings("decode")),
        }
        self.split: dict[str, str] = {phase: config.placement.split_of(phase) for phase in PHASES}
        self.gate_up_bias: Tensor | None = None
        self.down_bias: Tensor | None = None
        self.activation: Callable[[Tensor], Tensor] | None = None
        self.layer: ExpertParallelMoE | None = None
        check_room(self.layer_number, spec.num_experts)

    def ep_expert_list(self, world_size: int, rank: int) -> list[int]:
        """The logical expert of each of this rank's slots; LMDeploy loads their weights in this order."""
        return list(self.slot_map.local_experts(rank))

    def set_extras(
        self, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: Callable | None
    ) -> None:
        """Takes what belongs to the weights and LMDeploy hands over with each call only."""
        self.gate_up_bias, self.down_bias, self.activation = gate_up_bias, down_bias, activation

    def build_layer(self, gate_up_L2FD: Experts, down_LDF: Experts) -> None:
        """Builds the layer from this rank's weights, which LMDeploy has loaded."""
        config = active().config
        self.layer = ExpertParallelMoE(
            gate_up_L2FD,
            down_LDF,
            slot_map=self.slot_map,
            ranks=self.ranks,
            settings=self.settings,
            split=self.split,
            device=self.device,
            kernels=config.kernels,
            top_k=self.spec.top_k,
            renormalize=self.spec.renormalize,
            gate_up_bias_L2F=self.gate_up_bias,
            down_bias_LD=self.down_bias,
            activation=self.activation,
            check_ids=config.check_expert_ids,
            movable=balance.graphs_follow(config, self.device),
            layer=self.layer_number,
            context=active().context,
        )
        values = gate_up_L2FD if isinstance(gate_up_L2FD, Tensor) else gate_up_L2FD.values_LNK
        rank = get_dist_manager().current_context().rank
        active().stats_writer.watch(rank, self.layer_number, self.layer, values.device)
        decode = self.settings["decode"]
        if decode.static and decode.max_tokens:
            active().real_tokens.expect(decode.max_tokens, values.device)
        balance.watch(self.layer_number, self.layer, values.device)

    def forward(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *packed: Any, **extras: Any
    ) -> Tensor:
        """hidden_states [T, D], topk_weights and topk_ids [T, K] -> [T, D]; the layer has all the rest."""
        if self.layer is None:
            raise EPError(
                f"MoE layer {self.layer_number} has no weights yet: load them before the first forward"
            )
        plug, step = active(), get_step_ctx_manager().current_context()
        plug.pulse.at_layer(self.layer_number)
        # The same on every rank: with dp > 1 LMDeploy agrees on it before each forward.
        phase = "decode" if step.global_is_decoding() else "prefill"
        if self.settings[phase].static:
            padding = plug.real_tokens.padding(len(hidden_states))
            return self.layer(hidden_states, topk_ids, topk_weights, phase, padding)
        if plug.real_tokens.are_in(step):
            return self.layer(hidden_states, topk_ids, topk_weights, phase)
        self.layer(hidden_states[:0], topk_ids[:0], topk_weights[:0], phase)
        return torch.zeros_like(hidden_states)


class FloatExperts(LayerExperts, FusedMoEImpl):
    """Experts as they were trained: float32, bfloat16 or float16."""

    def update_weights(self, gate_up_weights: Tensor, down_weights: Tensor) -> tuple[Tensor, ...]:
        self.build_layer(gate_up_weights.data, down_weights.data)
        return placeholders(gate_up_weights, down_weights)


class BlockedF8Experts(LayerExperts, FusedMoEBlockedF8Impl):
    """Experts of float8, a scale for each block of 128 x 128 (DeepSeek-V3's own form).

    Scales that are powers of two (`scale_fmt` ue8m0) are float32 like others; rows are quantized with exact scales.
    """

    def __init__(self, spec: FusedMoEBlockedF8BuildSpec, device: str) -> None:
        if spec.block_size != BLOCK or spec.fp8_dtype != FP8:
            raise ConfigError(
                f"this model's experts are {spec.fp8_dtype} in blocks of {spec.block_size}; epbackend computes {FP8} "
                f"in blocks of {BLOCK}: use such a checkpoint, or the original one"
            )
        super().__init__(spec, device)

    def update_weights(
        self, gate_up_weights: Tensor, down_weights: Tensor, gate_up_scale: Tensor, down_scale: Tensor
    ) -> tuple[Tensor, ...]:
        # With tensor parallelism a rank may get no block at all; LMDeploy does not call us there.
        if gate_up_weights.numel():
            self.build_layer(
                Fp8Blocks(gate_up_weights.data, gate_up_scale.data),
                Fp8Blocks(down_weights.data, down_scale.data),
            )
        return placeholders(gate_up_weights, down_weights, gate_up_scale, down_scale)


class W8A8Experts(LayerExperts, FusedMoEW8A8Impl):
    """Experts of int8, a scale for each output; rows are quantized as they come."""

    def __init__(self, spec: FusedMoEW8A8BuildSpec, device: str) -> None:
        if spec.quant_dtype != torch.int8:
            raise ConfigError(
                f"this model's W8A8 experts are {spec.quant_dtype}; epbackend computes torch.int8: use a checkpoint of "
                "int8 or of blocked FP8, or the original one"
            )
        super().__init__(spec, device)

    def update_weights(
        self, gate_up_weights: Tensor, down_weights: Tensor, gate_up_scale: Tensor, down_scale: Tensor
    ) -> tuple[Tensor, ...]:
        self.build_layer(
            Int8Weights(gate_up_weights.data, gate_up_scale.data.squeeze(-1)),
            Int8Weights(down_weights.data, down_scale.data.squeeze(-1)),
        )
        return placeholders(gate_up_weights, down_weights, gate_up_scale, down_scale)


class NpuRouter(RouterNoauxTCImpl):
    """DeepSeek-V3's router in one operator of CANN, where LMDeploy has its default one: a dozen operators of torch."""

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


def placeholders(*weights: Tensor) -> tuple[Tensor, ...]:
    """What LMDeploy keeps in place of weights that our layer holds, so that memory has them once: one value of each.

    Without any value, it would believe that tensor parallelism left this rank no part of its FP8 experts.
    """
    return tuple(each.new_empty(1 if each.numel() else 0) for each in weights)


@contextmanager
def building(layer: int) -> Iterator[None]:
    """What is built in this block belongs to that layer."""
    token = _building.set(layer)
    try:
        yield
    finally:
        _building.reset(token)


def layer_being_built(requested: int | None) -> int:
    """The layer of the `building` block around the call, or else the one in LMDeploy's request, `requested`.

    Raises:
        UnavailableError: both are missing. All layers would count as one, and get the slots of one.
    """
    layer = _building.get()
    if layer is None:
        layer = requested
    if layer is None:
        raise UnavailableError(
            "this model's W8A8 experts do not tell which layer they belong to; use its bfloat16 or FP8 checkpoint"
        )
    return layer


def _bounded(decode: DispatchSettings) -> DispatchSettings:
    """With the most tokens of a decoding step, by which LMDeploy sizes its graphs: some a request, if drafted."""
    build = get_build_model_context()
    if not build.max_batch_size:
        return decode
    diffused = build.dllm_config.block_length if build.dllm_config else None
    return replace(decode, max_tokens=build.max_batch_size * max(1 + build.num_spec_tokens, diffused or 1))


def _ranks(spec: Spec) -> RankGroup:
    """This rank's place among the expert ranks; without expert parallelism each rank holds every expert, or a shard."""
    if spec.ep_size == 1:
        return RankGroup.single()
    tokens = get_dist_manager().current_context().attn_tp_group
    return RankGroup.of(spec.ep_group, tokens.gpu_group)
