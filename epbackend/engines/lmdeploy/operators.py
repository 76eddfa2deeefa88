"""LMDeploy's fused MoE operators: ours for each form of weights that can be spread over ranks."""

from __future__ import annotations

import torch
from lmdeploy.pytorch.backends.base import BuildSpec
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
from torch import Tensor

from epbackend.engines.lmdeploy.moe import LayerExperts
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError
from epbackend.kernels.fp8 import BLOCK, FP8, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights

NOT_SPREAD: dict[type[BuildSpec], str] = {
    FusedMoEStaticF8BuildSpec: "FP8 with one scale a tensor",
    FusedMoEW4A16BuildSpec: "4-bit integers (W4A16)",
    FusedMoEV4FP4BuildSpec: "4-bit floats (DeepSeek-V4)",
}
"""Forms of experts that only LMDeploy itself can compute, every rank all of them."""


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


class FloatExperts(LayerExperts, FusedMoEImpl):
    """Experts as they were trained: float32, bfloat16 or float16."""

    def update_weights(self, gate_up_weights: Tensor, down_weights: Tensor) -> tuple[Tensor, ...]:
        self.take(gate_up_weights.data, down_weights.data)
        return left_behind(gate_up_weights, down_weights)


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
            self.take(
                Fp8Blocks(gate_up_weights.data, gate_up_scale.data),
                Fp8Blocks(down_weights.data, down_scale.data),
            )
        return left_behind(gate_up_weights, down_weights, gate_up_scale, down_scale)


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
        self.take(
            Int8Weights(gate_up_weights.data, gate_up_scale.data.squeeze(-1)),
            Int8Weights(down_weights.data, down_scale.data.squeeze(-1)),
        )
        return left_behind(gate_up_weights, down_weights, gate_up_scale, down_scale)


def left_behind(*taken: Tensor) -> tuple[Tensor, ...]:
    """What LMDeploy keeps of weights that we took, so that they are held once: one value of each.

    Without any value, it would believe that tensor parallelism left this rank no part of its FP8 experts.
    """
    return tuple(each.new_empty(1 if each.numel() else 0) for each in taken)
