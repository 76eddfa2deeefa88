"""Which tensors of a checkpoint carry the numbers of experts: in their names, or in their rows.

An expert stored by itself carries its number in its tensors' names (`...experts.17.down_proj.weight`), whether they are
quantised or not, scales and packed forms too. Tensors that stack all experts, the router's weight, and what is added to
its scores carry them in the rows. What stands beside experts and is of no known form is refused, as it might carry
numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from epbackend.checkpoint import StoredTensor, listed
from epbackend.errors import ConfigError

EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<rest>.+)")
OF_ONE = re.compile(r"(?P<expert>\d+)\.(?P<part>.+)")
ROUTER = re.compile(
    r"(gate|router)(\.(wg|layer|linear|classifier))?"
    r"\.(weight|bias|weight_scale|weight_scale_inv|expert_bias|e_score_correction_bias)"
    r"|(moe_statics\.)?(expert_bias|e_score_correction_bias)"
)
"""Beside the experts of a block: their router, and what is added to its scores."""
SHARED = re.compile(r"shared\w*\..+")
"""Experts that every token goes to: they have no number."""
IN_STACK = re.compile(r"(?P<stack>.*)\b(?:layers|blocks|h)\.(?P<layer>\d+)(?P<tail>\..*)?")
DRAFT = re.compile(r"mtp|nextn")
"""In the names of layers that predict tokens for speculative decoding."""
NAMES_EXPERT = re.compile(r"experts\\?\.\d")


@dataclass
class Block:
    """The experts of one layer."""

    name: str
    parts: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Expert -> the tensors that are its own."""
    rows: list[str] = field(default_factory=list)
    """Tensors with a row for each expert, by their whole names."""
    stacked: bool = False
    """Whether some of these hold experts."""
    router: bool = False
    """Whether one of them is the router's weight."""

    def renamed(self, old_E: Sequence[int]) -> dict[str, str]:
        """Tensor -> its name once expert old_E[new] has the number `new`."""
        return {
            f"{self.name}.experts.{old}.{part}": f"{self.name}.experts.{new}.{part}"
            for new, old in enumerate(old_E)
            if new != old
            for part in self.parts[old]
        }


def blocks_of(tensors: Mapping[str, StoredTensor], experts: int, layers: int) -> dict[int, Block]:
    """Layer -> its experts, for the layers of the model; draft layers are left out.

    Raises:
        ConfigError: experts are in a form that is not known, or not whole; or two stacks of layers have experts.
    """
    found = {match["block"]: Block(match["block"]) for name in tensors if (match := EXPERT.fullmatch(name))}
    by_layer: dict[int, Block] = {}
    stacks: dict[tuple[str, str], str] = {}
    for block in found.values():
        place = IN_STACK.fullmatch(block.name)
        if place is None:
            raise ConfigError(
                f"{block.name}: has experts, but its name says no layer; they cannot be renumbered"
            )
        layer = int(place["layer"])
        if DRAFT.search(block.name) or layer >= layers:
            continue
        stacks[place["stack"], place["tail"] or ""] = block.name
        by_layer[layer] = block
    if len(stacks) > 1:
        raise ConfigError(
            f"{listed(stacks.values())}: several stacks of layers have experts, and loads are of one; such a model "
            "cannot be renumbered"
        )
    for name, tensor in tensors.items():
        if (around := _around(name, found)) is not None:
            _sort_in(around, name, tensor, experts)
    for block in by_layer.values():
        _check_whole(block, experts)
    return by_layer


def check_settings(name: str, settings: Any) -> None:
    """Raises ConfigError where a file of settings names single experts, which keep their old numbers there."""
    if isinstance(settings, str):
        if NAMES_EXPERT.search(settings):
            raise ConfigError(
                f"{name}: {settings!r} names an expert by its number, and would name another one; such a checkpoint "
                "cannot be renumbered"
            )
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            check_settings(name, key)
            check_settings(name, value)
    elif isinstance(settings, list):
        for value in settings:
            check_settings(name, value)


def _around(name: str, blocks: Mapping[str, Block]) -> Block | None:
    """The block that a tensor is in."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return blocks[name]
    return None


def _sort_in(block: Block, name: str, tensor: StoredTensor, experts: int) -> None:
    """Notes in a block how one of its tensors carries the numbers."""
    rest = name.removeprefix(f"{block.name}.")
    own = rest.removeprefix("experts.")
    of_experts, router = own != rest, ROUTER.fullmatch(rest)
    if of_experts and (one := OF_ONE.fullmatch(own)):
        if int(one["expert"]) >= experts:
            raise ConfigError(f"{name}: config.json says {experts} experts; use the one of these weights")
        block.parts[int(one["expert"])].add(one["part"])
    elif (of_experts or router) and _has_rows(tensor, experts):
        block.rows.append(name)
        block.stacked |= of_experts
        block.router |= router is not None and rest.endswith(".weight")
    elif not SHARED.fullmatch(rest) and not ((of_experts or router) and _single(tensor)):
        raise ConfigError(
            f"{name}: {tensor.dtype} {list(tensor.shape)} beside {experts} experts is a form of weights that is not "
            "known; it might carry their numbers, so nothing was written"
        )


def _has_rows(tensor: StoredTensor, experts: int) -> bool:
    """Whether the first dimension that is not 1 is that of the experts."""
    sizes = [size for size in tensor.shape if size != 1] or [1]
    return sizes[0] == experts and (tensor.end - tensor.start) % experts == 0


def _single(tensor: StoredTensor) -> bool:
    """Whether it is one number, for all experts alike."""
    return all(size == 1 for size in tensor.shape)


def _check_whole(block: Block, experts: int) -> None:
    """Raises ConfigError for a block without a router, or without weights of its experts."""
    if not block.router:
        raise ConfigError(
            f"{block.name}: has experts, but no router of its own with {experts} rows (gate.weight, router.weight); "
            "it is of an unknown form, or tied to another layer's, and cannot be renumbered"
        )
    if not (block.parts or block.stacked):
        raise ConfigError(f"{block.name}: holds no weights of its experts; they cannot be renumbered")
