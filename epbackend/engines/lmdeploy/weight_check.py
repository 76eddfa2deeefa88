"""Whether a checkpoint filled every parameter of this rank: LMDeploy starts with memory as it was where one is missing.

`WeightCheck` notes what is loaded while LMDeploy loads it, piece by piece: of an expert's gate and up matrices each, of
a matrix of queries, keys and values each. It reads no weights and holds none.

- Experts: each slot has its matrices, biases and scales, and biases and scales are numbers.
- All other parameters of a layer (its router, for one): what other layers of the model got, this one got too.
- A parameter that no layer got is only told of: models make some of them from others after loading.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from lmdeploy.pytorch.weight_loader.model_weight_loader import default_weight_loader
from torch import Tensor, nn

from epbackend.checkpoint import listed
from epbackend.engines.lmdeploy.operators import LayerExperts
from epbackend.errors import ConfigError

MATRICES = {"gate_up": ("gate", "up"), "down": ("down",)}
"""LMDeploy's module of an expert's weights, and the pieces that it is loaded in."""

logger = logging.getLogger("epbackend")

Piece = tuple[Hashable, ...]


@dataclass(frozen=True)
class _Loaded:
    """A parameter, its own loader, and how often each piece of it came."""

    parameter: nn.Parameter
    loader: Callable[..., None] | None
    """None: it has none of its own."""
    pieces: Counter[Piece] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Experts:
    """One tensor of all experts of a layer that this rank holds."""

    layer: int
    matrices: str
    """A key of MATRICES."""
    experts: list[int]
    """The expert in each slot."""


class WeightCheck:
    """A block in which LMDeploy loads the checkpoint at `path` into a model; an error of ours at its end, or in it.

    Raises:
        ConfigError: a tensor is missing, came twice, has another shape than its place, or a scale or bias is no number.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self._path = path
        self._experts = dict(_experts(model))
        self._loaded = {
            name: _Loaded(parameter, getattr(parameter, "weight_loader", None))
            for name, parameter in model.named_parameters()
            if not _is_dummy(model, name)
        }

    def __enter__(self) -> WeightCheck:
        for name, loaded in self._loaded.items():
            loaded.parameter.weight_loader = self._noting(name, loaded)  # type: ignore[attr-defined]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for loaded in self._loaded.values():
            if loaded.loader is None:
                del loaded.parameter.weight_loader  # type: ignore[attr-defined]
            else:
                loaded.parameter.weight_loader = loaded.loader  # type: ignore[attr-defined]
        if error is None:
            self._check_experts()
            self._check_others()

    def _noting(self, name: str, loaded: _Loaded) -> Callable[..., None]:
        load = loaded.loader or default_weight_loader
        names = tuple(inspect.signature(load).parameters)[2:]

        def note_and_load(parameter: nn.Parameter, weight: Tensor, *args: Any, **kwargs: Any) -> None:
            said = dict(zip(names, args, strict=False)) | kwargs
            try:
                load(parameter, weight, *args, **kwargs)
            except (RuntimeError, AssertionError) as failure:
                tensor = f"{self._words(name, said)}, of shape {tuple(weight.shape)},"
                raise ConfigError(f"{self._path}: {tensor} cannot be loaded: {failure}") from failure
            loaded.pieces[tuple(said.get(each) for each in names)] += 1

        return note_and_load

    def _check_experts(self) -> None:
        missing: list[str] = []
        twice: list[str] = []
        for name, experts in self._experts.items():
            loaded = self._loaded[name]
            for expert in dict.fromkeys(experts.experts):
                for matrix in MATRICES[experts.matrices]:
                    times = loaded.pieces[expert, matrix]
                    if times != 1:
                        words = self._words(name, {"expert_id": expert, "shard_id": matrix})
                        (twice if times else missing).append(words)
            if name.endswith(("bias", "scale", "scale_inv")):
                self._check_numbers(name, experts, loaded.parameter)
        if missing:
            raise ConfigError(
                f"{self._path}: the checkpoint lacks {listed(missing)}; download it again, or use the original one"
            )
        if twice:
            raise ConfigError(
                f"{self._path}: the checkpoint holds {listed(twice)} more than once; remove the files that are not in "
                "its index"
            )

    def _check_numbers(self, name: str, experts: _Experts, values: Tensor) -> None:
        bad_L = ~torch.isfinite(values.detach().flatten(1)).all(1)
        if bad_L.any():
            words = [
                self._words(name, {"expert_id": experts.experts[slot]})
                for slot in bad_L.nonzero().flatten().tolist()
            ]
            raise ConfigError(f"{self._path}: {listed(words)} holds NaN or infinity; use another checkpoint")

    def _check_others(self) -> None:
        pieces_of: defaultdict[str, set[Piece]] = defaultdict(set)
        for name, loaded in self._loaded.items():
            pieces_of[_in_any_layer(name)].update(loaded.pieces)
        missing, unknown = [], []
        for name, loaded in self._loaded.items():
            if name in self._experts:
                continue
            known = pieces_of[_in_any_layer(name)]
            if not known:
                unknown.append(name)
            for piece in known - set(loaded.pieces):
                missing.append(" ".join([name, *map(str, piece)]))
        if missing:
            raise ConfigError(
                f"{self._path}: the checkpoint lacks {listed(missing)}, which its other layers have; download it "
                "again, or use the original one"
            )
        if unknown:
            logger.info("%s: not in the checkpoint: %s", self._path, listed(unknown))

    def _words(self, name: str, said: dict[str, Any]) -> str:
        experts = self._experts.get(name)
        kind = name.rpartition(".")[2]
        if experts is None:
            return " ".join([name, *map(str, said.values())])
        matrix = said.get("shard_id", experts.matrices)
        return f"layer {experts.layer}, expert {said['expert_id']}: {matrix} {kind}"


def _experts(model: nn.Module) -> Iterator[tuple[str, _Experts]]:
    """The parameters of experts that are ours, by name."""
    for name, module in model.named_modules():
        operator = getattr(module, "impl", None)
        if not isinstance(operator, LayerExperts):
            continue
        for matrices in MATRICES:
            weights = getattr(module, matrices)
            for tensor, values in weights.named_parameters():
                held = module.expert_list if module.expert_list is not None else range(len(values))
                yield (
                    f"{name}.{matrices}.{tensor}",
                    _Experts(operator.layer_number, matrices, list(held)),
                )


def _is_dummy(model: nn.Module, name: str) -> bool:
    """Whether LMDeploy skips what the checkpoint holds for it: with pipeline parallelism, another rank's layers."""
    owners = name.split(".")[:-1]
    return any(
        getattr(model.get_submodule(".".join(owners[:depth])), "_is_dummy_mod", False)
        for depth in range(len(owners) + 1)
    )


def _in_any_layer(name: str) -> str:
    """The same name for the parameter of all layers."""
    return re.sub(r"\.\d+\.", ".*.", name)
