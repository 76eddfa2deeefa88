"""The experts of a transformers model: which modules they are, what of them this rank keeps, and what they compute.

A module of experts in transformers' common form (`use_experts_implementation`) says itself how its weights lie. After
`keep_slots` it has parameters for this rank's slots alone, in the shapes of the checkpoint, so that transformers' own
loader fills them; `take_weights` hands them to our layer. Letters of shapes are those of docs/architecture.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from epbackend.errors import ConfigError

TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token")


@dataclass(frozen=True)
class LoadedExperts:
    """The experts of this rank's slots, taken out of their module."""

    gate_up_L2FD: Tensor
    down_LDF: Tensor
    gate_up_bias_L2F: Tensor | None
    down_bias_LD: Tensor | None
    activation: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class ExpertsModule:
    """One layer's experts in a transformers model."""

    name: str
    module: Any
    number: int
    """Of the layer."""
    experts: int
    """E."""

    @property
    def parameters(self) -> list[str]:
        """The parameters' names inside the module, the first matrix's first."""
        first = "gate_up_proj" if self.module.has_gate else "up_proj"
        names = [first, "down_proj"]
        return [*names, *(f"{each}_bias" for each in names)] if self.module.has_bias else names

    @property
    def full_names(self) -> list[str]:
        """The parameters' names inside the model."""
        return [f"{self.name}.{each}" for each in self.parameters]

    def keep_slots(self, slots: int) -> None:
        """Makes the parameters, which hold no values yet, those of so many experts, whole on this rank."""
        for name in self.parameters:
            old = self.module._parameters[name]
            shape = (slots, *old.shape[1:])
            self.module._parameters[name] = nn.Parameter(
                torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=False
            )

    def take_weights(self) -> LoadedExperts:
        """The loaded weights; the module keeps an empty place of each, so that memory has them once."""
        taken = {name: self.module._parameters[name].detach() for name in self.parameters}
        for name, weight in taken.items():
            empty: Any = nn.Parameter(weight.new_empty(0), requires_grad=False)
            empty._is_hf_initialized = True  # transformers is not to initialize it
            self.module._parameters[name] = empty
        first, second, *biases = taken.values()
        if self.module.is_transposed:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        first_bias, second_bias = biases or (None, None)
        return LoadedExperts(first, second, first_bias, second_bias, self._activation())

    def _activation(self) -> Callable[[Tensor], Tensor] | None:
        """From the rows of the first product to those of the second; None: SwiGLU, for which kernels have their own."""
        module = self.module
        if not module.has_gate:
            return module.act_fn
        plain = type(module)._apply_gate is _default_apply_gate
        swiglu = plain and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
        return None if swiglu else module._apply_gate


def experts_of(model: nn.Module) -> list[ExpertsModule]:
    """The modules of experts, in the order of the layers.

    Raises:
        ConfigError: there are none that can be spread, or of a form that is not computed here.
    """
    architecture = type(model).__name__
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "has_post_expert_norm"):  # set by transformers' use_experts_implementation
            continue
        layer = re.search(r"\.(\d+)\.", f".{name}.")
        first = module._parameters.get("gate_up_proj" if module.has_gate else "up_proj")
        if layer is None or first is None:
            raise ConfigError(
                f"{architecture}: {name} is not experts of one layer in transformers' common form"
            )
        each = ExpertsModule(name, module, int(layer[1]), len(first))
        if reason := _not_computed(each):
            raise ConfigError(
                f"{architecture}: {name} {reason}, which epbackend does not compute; load it without distributed_config"
            )
        found.append(each)
    if not found:
        raise ConfigError(
            f"{architecture} has no experts in transformers' common form (use_experts_implementation): nothing can be "
            "spread"
        )
    numbers = [each.number for each in found]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"{architecture} has more than one module of experts in a layer: it cannot be spread"
        )
    return sorted(found, key=lambda each: each.number)


def top_k_of(model: Any) -> int:
    """K, from the model's config. Raises ConfigError where it does not say."""
    settings = model.config.get_text_config()
    for name in TOP_K_NAMES:
        if isinstance(found := getattr(settings, name, None), int):
            return found
    raise ConfigError(
        f"{type(model).__name__}: its config does not say how many experts a token has ({', '.join(TOP_K_NAMES)})"
    )


def _not_computed(each: ExpertsModule) -> str | None:
    """What this module of experts has that our layer does not; None if nothing."""
    module = each.module
    if module.has_post_expert_norm:
        return "norms each expert's answer"
    _, *arguments = inspect.signature(type(module).forward).parameters
    if len(arguments) != 3:
        return f"is called with {', '.join(arguments)} in place of hidden states, experts and weights"
    if other := {name for name, _ in module.named_parameters()} - set(each.parameters):
        return f"has the weights {', '.join(sorted(other))} beside its matrices"
    return None
