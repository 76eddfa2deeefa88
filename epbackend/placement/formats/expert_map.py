"""The expert map of vllm-ascend and MindIE: JSON with `moe_layer_count` and `layer_list`.

Each layer lists its devices, and each device its experts in the order of its slots. Layers are MoE layers; dense ones
are not in the file. `layer_id` numbers them from 0, or as the model does: then dense layers are the numbers left out.
Every device needs the same number of slots. vllm-ascend finds the slot of an expert by its number, so no device may
hold an expert twice. Node size and provenance are not kept.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from epbackend.errors import ConfigError
from epbackend.placement.formats.base import (
    PlacementFormat,
    ReadOptions,
    check_equal_slots,
    check_no_duplicates,
    imported,
    layout_of_layer,
    moe_layers,
    with_dense,
)
from epbackend.placement.formats.file import File
from epbackend.placement.placement import Placement

MOST_LAYERS = 4096
"""Of a model: the numbers of a file are not to be trusted."""


def _read(file: File, options: ReadOptions, name: str) -> Placement:
    described = _objects(file.json["layer_list"], "layer_list")
    if file.json["moe_layer_count"] != len(described):
        raise ConfigError(
            f"moe_layer_count: {str(file.json['moe_layer_count'])[:40]}, but layer_list has {len(described)} entries"
        )
    numbers = _layer_numbers(described)
    dense_layers = _dense_layers(numbers, options.dense_layers)
    listed = [_experts_of_devices(layer, f"layer_list[{index}]") for index, layer in enumerate(described)]
    held = [listed[numbers.index(number)] for number in sorted(numbers)]
    experts = 1 + max(expert for devices in held for device in devices for expert in device)
    layers = [layout_of_layer(index, devices, experts) for index, devices in enumerate(held)]
    return imported(with_dense(layers, dense_layers), file, name)


def _layer_numbers(described: list[dict[str, Any]]) -> list[int]:
    """The layer_id of each entry; the place in the list, where no entry has one."""
    given: list[Any] = [layer.get("layer_id") for layer in described]
    if given == [None] * len(given):
        return list(range(len(given)))
    for index, number in enumerate(given):
        if type(number) is not int or not 0 <= number < MOST_LAYERS:
            raise ConfigError(f"layer_list[{index}].layer_id: must be a whole number from 0, and sensible")
        if given.index(number) != index:
            raise ConfigError(f"layer_list[{index}].layer_id: {number} is there twice; give each layer once")
    return given


def _dense_layers(numbers: list[int], given: tuple[int, ...]) -> tuple[int, ...]:
    """The layers without experts: as given, or those that the numbers of the model's layers leave out."""
    left_out = {*range(max(numbers) + 1)} - {*numbers}
    before = {layer for layer in given if layer <= max(numbers)}
    if left_out and before and before != left_out:
        raise ConfigError(
            f"dense_layers: {_listed(before)} are given, but layer_id leaves out {_listed(left_out)}; "
            "give neither or the same"
        )
    return tuple(sorted(left_out | {*given}))


def _listed(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _experts_of_devices(layer: dict[str, Any], field: str) -> list[list[int]]:
    """The experts of one layer, checked: device by device, in order."""
    devices = _objects(layer.get("device_list"), f"{field}.device_list")
    held: list[Any] = [device.get("device_expert") for device in devices]
    for index, experts in enumerate(held):
        if not isinstance(experts, list) or not experts or any(type(expert) is not int for expert in experts):
            raise ConfigError(f"{field}.device_list[{index}].device_expert: must be a list of expert numbers")
    if [device.get("device_id", index) for index, device in enumerate(devices)] != list(range(len(devices))):
        raise ConfigError(f"{field}.device_list: device_id must count from 0")
    slots = sum(map(len, held))
    if max(map(max, held)) >= slots:  # checked here: one large number must not take memory
        raise ConfigError(
            f"{field}: expert {max(map(max, held))} of {slots} slots; number the experts from 0"
        )
    return held


def _objects(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{field}: must be a list of objects, not empty")
    return value


def _write(placement: Placement, dense_layers: tuple[int, ...], program: str) -> bytes:
    moe = moe_layers(placement, dense_layers)
    check_equal_slots(moe, program)
    check_no_duplicates(moe, program)
    described = [
        {
            "layer_id": row,
            "device_count": placement.ranks,
            "device_list": [
                {"device_id": rank, "device_expert": held} for rank, held in enumerate(layer.experts_of_rank)
            ],
        }
        for row, (_, layer) in enumerate(moe)
    ]
    lines = ",\n".join(json.dumps(layer) for layer in described)
    return f'{{"moe_layer_count": {len(described)}, "layer_list": [\n{lines}\n]}}\n'.encode()


def _format(name: str, program: str, usage: str) -> PlacementFormat:
    return PlacementFormat(
        name,
        lambda file: {"moe_layer_count", "layer_list"} <= file.keys,
        partial(_read, name=name),
        partial(_write, program=program),
        lambda placement, file: f"{program}: {usage}: {file}",
    )


VLLM_ASCEND = _format("vllm-ascend", "vllm-ascend", "in eplb_config, expert_map_path")
MINDIE = _format("mindie", "MindIE", "in its eplb settings, expert_map_file")
