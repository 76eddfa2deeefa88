"""A checkpoint whose experts are renumbered: contiguous blocks of them are then a planned placement, for any engine.

    plan = plan_renumbering("MODEL", read_loads("loads.json"), ranks=8)
    print(plan.before.imbalance_mean, plan.after.imbalance_mean)
    write(plan, Path("MODEL-balanced"))

The function of the model is the same: experts' weights, the router's rows and what is added to its scores change places
alike, layer by layer. Needs neither torch nor a device: a permutation only moves bytes.

- `tensors`: which tensors carry the numbers of experts, and which models are refused;
- `files`: streams the weights, and leaves a whole folder or none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epbackend.checkpoint import (
    INDEX,
    SAFETENSORS,
    Header,
    check_checkpoint,
    dense_layers,
    expert_count,
    layer_count,
    read_model_config,
    safetensors_header,
    shards,
)
from epbackend.engines.lmdeploy.hub import locate
from epbackend.errors import ConfigError
from epbackend.placement.contiguous import in_blocks, plan_order
from epbackend.placement.loads import Loads
from epbackend.placement.planners.base import Progress, silent
from epbackend.placement.renumbering import FILE, Renumbering, fingerprint, loads_for
from epbackend.placement.score import Score, score
from epbackend.renumber.files import (
    check_space,
    copy_rest,
    link,
    renamed_header,
    renamed_index,
    whole_folder,
    write_weights,
)
from epbackend.renumber.tensors import Block, blocks_of, check_settings

__all__ = ["Plan", "Written", "plan_renumbering", "plan_undoing", "write"]


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors checkpoint of a MoE model, its headers read."""

    path: Path
    experts: int
    """E."""
    layers: int
    """Y, dense ones too."""
    groups: int
    """Of the router: it chooses groups of experts first; 1 where it does not."""
    dense: tuple[int, ...]
    """Layers without experts."""
    headers: Mapping[str, Header]
    """By file."""
    renumbering: Renumbering | None
    """How it was renumbered before."""

    @classmethod
    def read(cls, model: str) -> Checkpoint:
        """The checkpoint at a path, or that of a model by name.

        Raises:
            UnavailableError: it is missing, or not whole.
            ConfigError: it is no MoE model in safetensors, or its settings name single experts.
        """
        path = Path(locate(model))
        settings = read_model_config(path)
        experts, layers = expert_count(settings), layer_count(settings)
        if experts is None or layers is None:
            raise ConfigError(f"{path} is a model without experts: there is nothing to renumber")
        check_checkpoint(str(path))
        if (path / SAFETENSORS).is_file():
            files = [SAFETENSORS]
        elif (path / (SAFETENSORS + INDEX)).is_file():
            files = list(shards(path / (SAFETENSORS + INDEX)))
        else:
            raise ConfigError(f"{path} has pickled weights: convert them to safetensors first")
        for file in [path / "config.json", *sorted(path.glob("*quant*config*.json"))]:
            check_settings(str(file), json.loads(file.read_text(encoding="utf-8")))
        return cls(
            path,
            experts,
            layers,
            router_groups(settings),
            dense_layers(settings),
            {file: safetensors_header(path / file) for file in files},
            Renumbering.beside(path),
        )

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Layer -> its experts. Raises ConfigError for forms of weights that are not known."""
        tensors = {name: each for header in self.headers.values() for name, each in header.tensors.items()}
        return blocks_of(tensors, self.experts, self.layers)


@dataclass(frozen=True)
class Plan:
    """What is to be written."""

    checkpoint: Checkpoint
    old_YE: np.ndarray
    """The number in the checkpoint of each expert to come, int64 [Y, E]."""
    record: Renumbering | None
    """What is written beside it; None: it becomes the original again."""
    before: Score | None = None
    """Of contiguous blocks, as the checkpoint is. None where it is undone."""
    after: Score | None = None
    nodes_before: Score | None = None
    """Of nodes in place of ranks; None where one is planned for."""
    nodes_after: Score | None = None

    @property
    def changed(self) -> tuple[int, ...]:
        """Layers in which experts change their numbers."""
        return Renumbering(self.old_YE).changed

    @property
    def gain(self) -> float:
        """The share of the busiest rank's load that is saved, mean over the layers; 0 where nothing is planned."""
        return _saved(self.before, self.after)

    @property
    def node_gain(self) -> float:
        """The same of the busiest node."""
        return _saved(self.nodes_before, self.nodes_after)


def _saved(before: Score | None, after: Score | None) -> float:
    if before is None or after is None:
        return 0.0
    return 1 - after.imbalance_mean / before.imbalance_mean


@dataclass(frozen=True)
class Written:
    """What `write` did."""

    bytes: int
    """Of weights that were written; what is linked does not count."""
    seconds: float
    files: int
    """Weight files that were written."""
    linked: int
    """Weight files in which nothing changed: hard links."""
    left_out: tuple[str, ...]
    """Other weights of the folder, in which experts would have their old numbers."""


def plan_renumbering(
    model: str,
    loads: Loads,
    *,
    ranks: int,
    nodes: int = 1,
    rank_speed: Sequence[float] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Plans without replicas on recorded loads, for engines with `ranks` contiguous blocks of experts.

    `rank_speed`: how fast each rank is, in any unit; it is then times that are balanced.

    Raises:
        UnavailableError: the checkpoint is missing, or not whole.
        ConfigError: it cannot be renumbered, the loads are of another model, or the ranks do not suit it.
    """
    checkpoint = Checkpoint.read(model)
    before = checkpoint.renumbering
    loads = loads_for(before, _loads_of(checkpoint, loads))
    order_YE = plan_order(
        loads,
        ranks=ranks,
        nodes=nodes,
        groups=checkpoint.groups,
        rank_speed=rank_speed,
        progress=progress,
    )
    if missing := [layer for layer in loads.loaded_layers if layer not in checkpoint.blocks]:
        raise ConfigError(
            f"loads: layer {missing[0]} has tokens, but {checkpoint.path} has no experts there: the loads are of "
            "another model, or its layers share (tie) their experts, which cannot be renumbered"
        )
    in_order_YE = np.tile(np.arange(loads.experts), (loads.layers, 1))
    total_YE = order_YE if before is None else np.take_along_axis(before.old_YE, order_YE, axis=1)
    original_YE = in_order_YE if before is None else before.new_YE
    orders = (in_order_YE, order_YE)
    of_nodes = [score(in_blocks(each, nodes), loads) for each in orders] if nodes > 1 else []
    planned_on = [fingerprint(np.take_along_axis(each, original_YE, axis=1)) for each in loads.tokens_WYE]
    return Plan(
        checkpoint,
        order_YE,
        Renumbering(total_YE, tuple(planned_on), before.headers if before else {}),
        *(score(in_blocks(each, ranks), loads, rank_speed=rank_speed) for each in orders),
        *of_nodes,
    )


def plan_undoing(model: str) -> Plan:
    """Gives experts the numbers back that they had at first.

    Raises:
        UnavailableError: the checkpoint is missing, or not whole.
        ConfigError: it was not renumbered.
    """
    checkpoint = Checkpoint.read(model)
    if checkpoint.renumbering is None:
        raise ConfigError(f"undo: {checkpoint.path} has no {FILE}: it was not renumbered")
    return Plan(checkpoint, checkpoint.renumbering.new_YE, None)


def write(plan: Plan, out: Path, progress: Callable[[int, int], None] = silent) -> Written:
    """Writes the checkpoint, whole or not at all. `progress` is called with bytes (done, in all).

    Raises:
        ConfigError: `out` exists, is in the checkpoint's folder, or cannot be written.
    """
    began = time.perf_counter()
    source, headers = plan.checkpoint.path, plan.checkpoint.headers
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"out: {out} is in the folder that is read; name another one")
    names: dict[str, str] = {}
    rows: dict[str, list[int]] = {}
    for layer in plan.changed:
        if (block := plan.checkpoint.blocks.get(layer)) is None:
            raise ConfigError(f"{source}: layer {layer} is renumbered in {FILE}, but has no experts")
        old_E = plan.old_YE[layer].tolist()
        names |= block.renamed(old_E)
        rows |= dict.fromkeys(block.rows, old_E)
    lengths = dict(plan.checkpoint.renumbering.headers) if plan.checkpoint.renumbering else {}
    undone = lengths if plan.record is None else {}
    changed = [
        file
        for file, header in headers.items()
        if not header.tensors.keys().isdisjoint({*names, *rows})
        or undone.get(file, header.length) != header.length
    ]
    total = sum((source / file).stat().st_size for file in changed)
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    with whole_folder(out) as folder:
        check_space(folder, total)
        for file, header in headers.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in changed:
                link(source / file, folder / file)
                continue
            new = renamed_header(header.text, names, undone.get(file))
            lengths.setdefault(file, header.length)
            write_weights(source / file, folder / file, header, new, rows, advance)
        index = SAFETENSORS + INDEX
        if (source / index).is_file():
            text = renamed_index((source / index).read_text(encoding="utf-8"), names)
            (folder / index).write_text(text, encoding="utf-8")
        if plan.record is not None:
            record = Renumbering(plan.record.old_YE, plan.record.planned_on, lengths)
            (folder / FILE).write_text(record.to_json(), encoding="utf-8")
        left_out = copy_rest(source, folder, {*headers, index, FILE})
    return Written(
        done, time.perf_counter() - began, len(changed), len(headers) - len(changed), tuple(left_out)
    )


def router_groups(settings: dict[str, Any]) -> int:
    """Groups of experts among which a router chooses first, from config.json; 1 where it has none, or takes all."""
    text = settings.get("text_config") or settings
    if (
        groups := text.get("router_n_groups") or 0
    ) > 0:  # LMDeploy's, with as many chosen in each; -1 for none
        return int(groups)
    groups, chosen = text.get("n_group") or 1, text.get("topk_group") or 0
    return 1 if groups == chosen or text.get("topk_method") == "greedy" else int(groups)


def _loads_of(checkpoint: Checkpoint, loads: Loads) -> Loads:
    """The loads of all layers of the model. Raises ConfigError for those of another one."""
    if checkpoint.dense and loads.layers + len(checkpoint.dense) == checkpoint.layers:
        loads = loads.with_dense(checkpoint.dense)
    for name, has, needed in (
        ("layers", loads.layers, checkpoint.layers),
        ("experts", loads.experts, checkpoint.experts),
    ):
        if has != needed:
            raise ConfigError(
                f"loads: they have {has} {name}, but {checkpoint.path} has {needed}; record them with this model "
                "(epbackend record)"
            )
    return loads
