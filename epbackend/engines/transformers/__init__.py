"""Any MoE model of transformers with its experts spread over ranks by epbackend.

    config = EPConfig.load({"ep_size": 2, "device": "cpu", "ep_level": 2})
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=distributed_config(config))
    model.generate(...)                          # on every rank, in a script started by torchrun
    print(spread_experts(model).load().tokens_per_rank)
    spread_experts(model).close()

transformers' own interface for expert parallelism (`EPImplementationInterface`) cuts experts into equal blocks, and is
reached only together with tensor parallelism or FSDP. So two functions of its loading are replaced instead, which go on
doing what they did for every other model:

- `maybe_distribute_model`: a model made with our config gets our layers in place of its experts (`spread`, `experts`);
- `convert_and_load_state_dict_in_model`: it sees a checkpoint of this rank's experts alone (`checkpoint_view`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
import transformers.modeling_utils as modeling_utils
from transformers.distributed import DistributedConfig
from transformers.distributed.mixin import DistributedMixin

from epbackend.config import EPConfig
from epbackend.dispatch.base import RankGroup
from epbackend.engines.torchrun import join
from epbackend.engines.transformers.spread import SpreadExperts
from epbackend.errors import ConfigError, EPError, UnavailableError

__all__ = ["SpreadConfig", "SpreadExperts", "distributed_config", "spread_experts"]

KNOWN = ("5.23.0", "5.24.0")
"""Releases in which the replaced functions have the same sources."""
HELD = "epbackend_experts"
"""The attribute of a model that holds its SpreadExperts."""


class SpreadConfig(DistributedConfig):
    """transformers' config of a model whose experts are spread by ours, among `ranks`."""

    ep: EPConfig
    ranks: RankGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> SpreadConfig:
        return self  # a process group cannot be copied


def distributed_config(config: EPConfig, group: dist.ProcessGroup | None = None) -> SpreadConfig:
    """What `from_pretrained(..., distributed_config=)` takes, on every rank. It joins the ranks of a torchrun first.

    With `engine.dp` 1 all ranks are given the same batch and attention is cut among them (transformers' tensor
    parallelism, which needs accelerate). With `engine.dp` = `ep_size` each rank has its own batch and all of attention.

    Args:
        config: its parts about ranks, dispatch and placement; `engine` beside `dp` is LMDeploy's and has no effect.
        group: the ranks that share the experts; None: all.

    Raises:
        UnavailableError: transformers has other hooks than those known, or the device cannot be used.
        ConfigError: a setting asks for what is not here.
    """
    EPConfig.require(config)
    _check_settings(config)
    _replace_hooks()
    made = SpreadConfig(tp_size=config.ep_size // config.engine.dp)
    made.ep, made.ranks = config, join(config, group)
    return made


def spread_experts(model: Any) -> SpreadExperts:
    """The spread experts of a model: their load report, and `close`. Raises EPError for any other model."""
    found = getattr(model, HELD, None)
    if found is None:
        raise EPError(
            f"{type(model).__name__} was not loaded with epbackend.engines.transformers.distributed_config"
        )
    return found


def _check_settings(config: EPConfig) -> None:
    """Raises ConfigError for what the config asks for and is not here."""
    if config.balance.on:
        raise ConfigError("balance.on: experts do not move while transformers runs a model; remove it")
    if config.engine.dp not in (1, config.ep_size):
        raise ConfigError(
            f"engine.dp: {config.engine.dp}; with transformers either every rank has its own batch (engine.dp: "
            f"{config.ep_size}, as ep_size), or all have the same (engine.dp: 1)"
        )
    if config.world_size > config.ep_size:
        raise ConfigError(
            f"engine.tp: with transformers ranks share experts; set ep_size: {config.engine.tp}"
        )


def _check_heads(model: Any, ranks: int) -> None:
    """Raises ConfigError for attention that cannot be cut among so many ranks."""
    settings = model.config.get_text_config()
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    if heads % ranks:
        raise ConfigError(
            f"engine.dp: 1 cuts attention among {ranks} ranks, which the {heads} key-value heads of "
            f"{type(model).__name__} do not allow; set engine.dp: {ranks}, a batch for each rank"
        )


def _distributing(original: Any) -> Any:
    """Gives a model made with our config our layers in place of its experts."""

    @wraps(original.__func__)
    def maybe_distribute_model(cls: type, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        if isinstance(distributed_config, SpreadConfig):
            _check_heads(model, distributed_config.ranks.token_size)
        model = original.__func__(cls, model, distributed_config, mesh_manager)
        if isinstance(distributed_config, SpreadConfig):
            ranks = distributed_config.ranks
            held = SpreadExperts(model, distributed_config.ep, ranks)
            setattr(model, HELD, held)
            if ranks.sources > 1:
                # generate() then goes on until every rank has its answer, as it does with FSDP: every one of ours.
                model._is_fsdp_managed_module = True
                model._has_unfinished_sequences = held.any_unfinished
        return model

    return classmethod(maybe_distribute_model)


def _loading(original: Any) -> Any:
    """Loads this rank's experts alone, and makes layers of them."""

    @wraps(original)
    def convert_and_load_state_dict_in_model(
        model: Any, state_dict: Any, load_config: Any, disk_offload_index: Any = None
    ) -> Any:
        held = getattr(model, HELD, None)
        if held is None or held.layers:
            return original(model, state_dict, load_config, disk_offload_index)
        view = held.view(model, state_dict, load_config.weight_mapping or [])
        loaded = original(model, view, load_config, disk_offload_index)
        held.build(loaded[0])
        model.requires_grad_(False)  # our layers have no gradients
        return loaded

    return convert_and_load_state_dict_in_model


@dataclass(frozen=True)
class Hook:
    """A function of transformers to replace."""

    owner: Any
    name: str
    fingerprint: str
    """Twelve hex digits of the SHA-256 of its source in the KNOWN releases."""
    build: Callable[[Any], Any]
    """Makes the replacement from the original."""


HOOKS = (
    Hook(modeling_utils, "convert_and_load_state_dict_in_model", "89e7737367f7", _loading),
    Hook(DistributedMixin, "maybe_distribute_model", "d4958f76742e", _distributing),
)


@cache
def _replace_hooks() -> None:
    """Once a process. Raises UnavailableError for a transformers whose hooks are others, before any is replaced."""
    originals = [getattr(hook.owner, hook.name) for hook in HOOKS]
    for hook, original in zip(HOOKS, originals, strict=True):
        if hashlib.sha256(inspect.getsource(original).encode()).hexdigest()[:12] != hook.fingerprint:
            raise UnavailableError(
                f"transformers {version('transformers')}: {hook.name} is not the one that epbackend knows; install one "
                f"of {', '.join(KNOWN)}"
            )
    for hook, original in zip(HOOKS, originals, strict=True):
        setattr(hook.owner, hook.name, hook.build(original))
