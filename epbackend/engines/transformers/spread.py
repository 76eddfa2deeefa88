"""The experts of one transformers model, spread over the ranks: its layers, its steps, and what they did.

A step is one forward pass of the model. All ranks make the same steps, and agree on the phase of each before it, where
they hold different tokens. Letters of shapes are those of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.context import GroupContext
from epbackend.engines.load_report import LoadReport
from epbackend.engines.placement import slot_map_of
from epbackend.engines.torchrun import StepCounts, agreed_placement
from epbackend.engines.transformers.checkpoint_view import rank_view
from epbackend.engines.transformers.experts import experts_of, top_k_of
from epbackend.errors import ConfigError, EPError
from epbackend.moe import ExpertParallelMoE
from epbackend.names import PHASES, Phase
from epbackend.placement.placement import Placement


class SpreadExperts:
    """Our layers in place of a model's experts. Close it before the process groups; the model then answers no more."""

    def __init__(self, model: Any, config: EPConfig, ranks: RankGroup) -> None:
        """Takes the model, made and not yet loaded; all ranks do so together.

        Raises:
            ConfigError: the model's experts cannot be spread so, or the ranks were given different configs.
        """
        if getattr(model.config, "quantization_config", None):
            raise ConfigError(
                f"{type(model).__name__}: quantized experts are not spread in transformers; use the original checkpoint"
            )
        self.config, self.ranks = config, ranks
        self.layers: list[ExpertParallelMoE] = []
        """One for each layer with experts, once the model is loaded."""
        self._modules, self._top_k = experts_of(model), top_k_of(model)
        self._context = GroupContext()
        layers = model.config.get_text_config().num_hidden_layers
        placement = agreed_placement(
            config, ranks, layers, [each.number for each in self._modules], model.name_or_path
        )
        if placement is not None:
            _check_slots(placement)
        self._slot_maps = [
            slot_map_of(placement, each.number, each.experts, ranks.size) for each in self._modules
        ]
        self._phase: Phase = "prefill"
        for index, (each, slot_map) in enumerate(zip(self._modules, self._slot_maps, strict=True)):
            each.keep_slots(len(slot_map.local_experts(ranks.rank)))
            each.module.forward = partial(self._compute, index)
        model.register_forward_pre_hook(self._begin_step, with_kwargs=True)
        model.register_forward_hook(self._end_step)
        model.save_pretrained = _refuse_to_save

    def view(self, model: Any, checkpoint: Mapping[str, Any], conversions: Iterable[Any]) -> dict[str, Any]:
        """The checkpoint with this rank's experts alone, for transformers to load."""
        slot_maps = {
            name: slot_map
            for each, slot_map in zip(self._modules, self._slot_maps, strict=True)
            for name in each.full_names
        }
        return rank_view(model, checkpoint, list(conversions), slot_maps, self.ranks.rank)

    def build(self, loading_info: Any) -> None:
        """Builds the layers from the weights that transformers has loaded; all ranks do so together.

        Raises:
            ConfigError: weights are missing, or lie on another device than the config says.
        """
        _check_loaded([name for each in self._modules for name in each.full_names], loading_info)
        config, device = self.config, get_device(self.config.device)
        # Nothing here captures graphs, and ranks bring any numbers of tokens.
        settings: dict[str, DispatchSettings] = {
            phase: replace(config.dispatch_settings(phase), static=False) for phase in PHASES
        }
        most = max(len(slot_map.local_experts(self.ranks.rank)) for slot_map in self._slot_maps)
        for each, slot_map in zip(self._modules, self._slot_maps, strict=True):
            weights = each.take_weights()
            place = weights.gate_up_L2FD.device
            if place.type != device.torch_device(0).type:
                raise ConfigError(
                    f"device: {device.name}, but transformers has loaded the model to {place}; set both alike "
                    "(device_map)"
                )
            layer = ExpertParallelMoE(
                weights.gate_up_L2FD,
                weights.down_LDF,
                slot_map=slot_map,
                ranks=self.ranks,
                settings=settings,
                top_k=self._top_k,
                split={phase: config.placement.split_of(phase) for phase in PHASES},
                device=config.device,
                kernels=config.kernels,
                gate_up_bias_L2F=weights.gate_up_bias_L2F,
                down_bias_LD=weights.down_bias_LD,
                activation=weights.activation,
                check_ids=config.check_expert_ids,
                layer=each.number,
                context=self._context,
            )
            if not self.layers:
                self._empty_0D = weights.down_LDF.new_empty(0, weights.down_LDF.shape[1])
                self._counts = StepCounts(len(self._modules), most, place)
            self._counts.watch(layer)
            self.layers.append(layer)

    def join_step(self) -> None:
        """One step of the others, with no token of one's own: for a rank that has nothing to answer meanwhile.

        Raises:
            EPError: the ranks have the same batch, so that none can do without the model.
        """
        if self.ranks.sources == 1:
            raise EPError(
                "join_step: it is for ranks with batches of their own (engine.dp: as ep_size); with the same batch all "
                "of them call the model"
            )
        self._agree("decode")
        ids_0K = torch.empty(0, self._top_k, dtype=torch.int64, device=self._empty_0D.device)
        for index in range(len(self.layers)):
            self._compute(index, self._empty_0D, ids_0K, self._empty_0D.new_empty(0, self._top_k))
        self._end_step()

    def join_generate(self) -> None:
        """All steps of the others' `generate`, with no prompt of one's own. Raises EPError as `join_step` does."""
        self.join_step()  # the prompts, whose step gives the first token too
        device = self._empty_0D.device
        self.any_unfinished(True, True, device)
        while self.any_unfinished(True, True, device):
            self.join_step()

    def any_unfinished(self, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
        """Whether a rank goes on: what `generate` asks before each token, among our ranks.

        In place of transformers' `_has_unfinished_sequences`, which asks all processes there are, and waits for longer.

        Raises:
            CollectiveError: a rank does not answer in time.
        """
        if not synced_gpus:
            return not this_peer_finished
        return 1 in self._told_by_all(int(not this_peer_finished), device)

    def load(self) -> LoadReport:
        """What the experts of every rank did so far; all ranks ask together, and get the same."""
        return self._counts.report(self.ranks, self._top_k)

    def close(self) -> None:
        """Ends what the layers hold on their process groups. A second call does nothing."""
        for layer in self.layers:
            layer.close()
        self._context.close()

    def _compute(
        self, index: int, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """What the model calls in place of its experts: hidden_states [T, D], the others [T, K] -> [T, D]."""
        if top_k_index.shape[1] != self._top_k:
            raise EPError(
                f"the router chose {top_k_index.shape[1]} experts a token, but the config says {self._top_k}"
            )
        return self.layers[index](hidden_states, top_k_index, top_k_weights, phase=self._phase)

    def _begin_step(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        tokens = next(each for each in given if isinstance(each, Tensor))
        self._agree("decode" if tokens.shape[1] == 1 else "prefill")

    def _agree(self, phase: Phase) -> None:
        """The phase of the coming step: decode where every rank decodes."""
        if self.ranks.sources > 1:
            said = self._told_by_all(PHASES.index(phase), self._empty_0D.device)
            phase = "prefill" if PHASES.index("prefill") in said else "decode"
        self._phase = phase

    def _told_by_all(self, number: int, device: torch.device) -> list[int]:
        """The numbers of all ranks. Raises CollectiveError where one does not answer in time."""
        mine_1 = torch.tensor([number], dtype=torch.int64, device=device)
        layer, timeout_s = self.layers[0].layer, self.config.timeout_s
        asked = Collectives(self.ranks.group, timeout_s, layer, self._context).all_gather_ints(mine_1)
        return [each for (each,) in asked]

    def _end_step(self, *_: Any) -> None:
        self._counts.end_step()


def _check_slots(placement: Placement) -> None:
    """Raises ConfigError for more slots than a rank can load: the checkpoint has a name for each expert."""
    if (most := max(int(layer.slots_R.max()) for layer in placement.layers)) > placement.experts:
        raise ConfigError(
            f"placement: a rank has {most} slots for {placement.experts} experts; use fewer redundant experts"
        )


def _check_loaded(names: list[str], loading_info: Any) -> None:
    """Raises ConfigError where transformers could not fill the experts: none may have random weights."""
    failed = {name: text.strip().splitlines()[0] for name, text in loading_info.conversion_errors.items()}
    failed |= {
        name: f"it is {list(found)} and not {list(needed)}"
        for name, found, needed in loading_info.mismatched_keys
    }
    failed |= dict.fromkeys(loading_info.missing_keys, "it is missing")
    if bad := next((name for name in names if name in failed), None):
        raise ConfigError(f"checkpoint: {bad} cannot be loaded for the slots of one rank: {failed[bad]}")


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise EPError(
        "save_pretrained: this rank has its own experts alone; save the model where it is loaded whole"
    )
