"""A checkpoint as one rank sees it: as if the model had the experts of this rank's slots, and no others.

transformers' loader gets a mapping from names to lazy tensors. Here the names of experts get the tensors of other
experts, or of none, before anything is read: expert 0's name that of this rank's first slot, and so on. So a rank reads
and holds its own experts alone, replicas included, by transformers' own conversions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from epbackend.errors import ConfigError
from epbackend.replica_split import SlotMap


class SlotsOf:
    """A tensor [E, ...] of the checkpoint with the experts of some slots alone, [L, ...]; read when it is indexed."""

    def __init__(self, source: Any, slots: Sequence[int]) -> None:
        self._source, self._slots = source, slots

    def get_shape(self) -> list[int]:
        return [len(self._slots), *_shape(self._source)[1:]]

    def __getitem__(self, index: Any) -> Tensor:
        return torch.stack([self._source[expert] for expert in self._slots])[index]


def rank_view(
    model: Any,
    state_dict: Mapping[str, Any],
    conversions: Sequence[Any],
    slot_maps: Mapping[str, SlotMap],
    rank: int,
) -> dict[str, Any]:
    """The checkpoint `state_dict` for a rank, which has at most E slots in each layer.

    Args:
        model: with its parameters as the rank holds them.
        state_dict: the checkpoint's names, and what reads each tensor.
        conversions: transformers' weight conversions for the model.
        slot_maps: the slots of each parameter that holds experts.
        rank: among those that share the experts.

    Raises:
        ConfigError: experts come in a form that cannot be told apart.
    """
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    parameters = model.state_dict()
    view: dict[str, Any] = {}
    pieces: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for key in sorted(state_dict, key=dot_natural_key):  # the loader's order, in which it counts experts
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if target not in slot_maps:
            view[key] = state_dict[key]
        elif len(_shape(state_dict[key])) == parameters[target].ndim - 1:
            pieces[target, pattern].append(key)
        else:
            _check_count(key, _shape(state_dict[key])[0], slot_maps[target])
            view[key] = SlotsOf(state_dict[key], slot_maps[target].local_experts(rank))
    for (target, _), keys in pieces.items():
        _check_count(keys[0], len(keys), slot_maps[target])
        held = slot_maps[target].local_experts(rank)
        view |= {keys[slot]: state_dict[keys[expert]] for slot, expert in enumerate(held)}
    return view


def _check_count(key: str, found: int, slot_map: SlotMap) -> None:
    if found != slot_map.experts:
        raise ConfigError(
            f"checkpoint: {key} and its like hold {found} experts, but the layer has {slot_map.experts}"
        )


def _shape(source: Any) -> list[int]:
    return list(source.shape) if isinstance(source, Tensor) else source.get_shape()
