"""The experts of one MoE layer of a LMDeploy model, computed by `epbackend.moe.ExpertParallelMoE`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from lmdeploy.pytorch.backends.moe import (
    FusedMoEBlockedF8BuildSpec,
    FusedMoEBuildSpec,
    FusedMoEW8A8BuildSpec,
)
from lmdeploy.pytorch.distributed import get_dist_manager
from lmdeploy.pytorch.model_inputs import get_step_ctx_manager
from lmdeploy.pytorch.models.patch import get_build_model_context
from torch import Tensor

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.engines.lmdeploy.layers import layer_being_built
from epbackend.engines.lmdeploy.load import check_room
from epbackend.engines.lmdeploy.state import active
from epbackend.errors import ConfigError, EPError
from epbackend.kernels.weight_formats import Experts
from epbackend.moe import ExpertParallelMoE
from epbackend.names import PHASES
from epbackend.placement.placement import Placement
from epbackend.replica_split import SlotMap

Spec: TypeAlias = FusedMoEBuildSpec | FusedMoEBlockedF8BuildSpec | FusedMoEW8A8BuildSpec


class LayerExperts:
    """What the operators of all forms of weights share. LMDeploy loads `ep_expert_list`, this computes them.

    LMDeploy's part: routing, the shared experts, and with ep_size 1 and tp > 1 the sum over the shards of each expert.
    """

    def __init__(self, spec: Spec, device: str) -> None:
        config = active().config
        self.spec, self.device = spec, device
        self.layer_number = layer_being_built(getattr(spec, "layer_idx", None))
        self.ranks = _ranks(spec)
        self.slot_map = _slot_map(active().placement, self.layer_number, spec.num_experts, self.ranks.size)
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

    def take(self, gate_up_L2FD: Experts, down_LDF: Experts) -> None:
        """Makes the layer of the rank's weights, which LMDeploy has loaded."""
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
            gate_up_bias_L2F=self.gate_up_bias,
            down_bias_LD=self.down_bias,
            activation=self.activation,
            check_ids=config.check_expert_ids,
            layer=self.layer_number,
            context=active().context,
        )
        values = gate_up_L2FD if isinstance(gate_up_L2FD, Tensor) else gate_up_L2FD.values_LNK
        rank = get_dist_manager().current_context().rank
        active().load_writer.watch(rank, self.layer_number, self.layer, values.device)

    def forward(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *packed: Any, **extras: Any
    ) -> Tensor:
        """hidden_states [T, D], topk_weights and topk_ids [T, K] -> [T, D]; the layer has all the rest."""
        if self.layer is None:
            raise EPError(
                f"MoE layer {self.layer_number} has no weights yet: load them before the first forward"
            )
        if self.spec.renormalize:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return self.layer(hidden_states, topk_ids, topk_weights, phase=_phase())


def _bounded(decode: DispatchSettings) -> DispatchSettings:
    """With the most tokens of a decoding step, by which LMDeploy sizes its graphs: some a request, if drafted."""
    build = get_build_model_context()
    if not build.max_batch_size:
        return decode
    diffused = build.dllm_config.block_length if build.dllm_config else None
    return replace(decode, max_tokens=build.max_batch_size * max(1 + build.num_spec_tokens, diffused or 1))


def _slot_map(placement: Placement | None, layer: int, experts: int, ranks: int) -> SlotMap:
    """Where this layer's experts live. Layers after the model's own, those of a draft model, are not in a placement."""
    if placement is None or layer >= len(placement.layers):
        return SlotMap.uniform(experts, ranks)
    if placement.experts != experts:
        raise ConfigError(
            f"placement: it has {placement.experts} experts, but MoE layer {layer} has {experts}; plan one for it"
        )
    return SlotMap(placement.layers[layer], placement.node_size)


def _phase() -> str:
    """The step's phase, the same on every rank: with dp > 1 LMDeploy agrees on it before each forward."""
    return "decode" if get_step_ctx_manager().current_context().global_is_decoding() else "prefill"


def _ranks(spec: Spec) -> RankGroup:
    """This rank's place among the expert ranks; without expert parallelism each rank holds every expert, or a shard."""
    if spec.ep_size == 1:
        return RankGroup.single()
    tokens = get_dist_manager().current_context().attn_tp_group
    return RankGroup.of(spec.ep_group, tokens.gpu_group)
