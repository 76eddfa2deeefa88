"""LMDeploy's own modules of experts on several ranks, built and loaded as a model does it, with our operators inside.

`module_equals_reference` runs on every rank: `ranks.run(2, module_equals_reference, case)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmdeploy.pytorch.config import DistConfig
from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
from lmdeploy.pytorch.distributed import DistContext, DistGroup, get_dist_manager
from lmdeploy.pytorch.model_inputs import BuildModelContext, StepContextManager, step_ctx_manager
from lmdeploy.pytorch.models.patch import build_model_context
from lmdeploy.pytorch.nn.moe.blocked_fp8 import FusedMoEBlockedF8
from lmdeploy.pytorch.nn.moe.default import FusedMoE
from lmdeploy.pytorch.nn.moe.w8a8 import FusedMoEW8A8
from torch import Tensor, nn

from epbackend import EPConfig
from epbackend.device import get_device
from epbackend.device.cuda import CudaDevice
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.engines.lmdeploy import plug, state
from epbackend.engines.lmdeploy.operators import building
from epbackend.engines.load_report import LoadReport
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.weight_formats import Experts
from epbackend.moe import ExpertParallelMoE
from epbackend.placement.placement import Layout, Placement
from epbackend.replica_split import SlotMap
from tests.helpers.layer_case import place_of

FORMS = ("float", "fp8", "w8a8")
PLACE = CudaDevice().torch_device(0)
E, K, F = 8, 3, 128
LAYER = 2
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Relative error allowed: what rows lose where they are rounded, and quantized, at slightly different values."""
COPIES = Layout(((0, 1, 2, 3, 7), (4, 5, 6, 7, 0, 0)), E)
"""Unequal ranks, an expert on both of them, another twice on one."""


@dataclass(frozen=True)
class Case:
    """A layer of LMDeploy, how its ranks divide the work, and what it is given."""

    form: str
    """One of FORMS."""
    device: str
    size: int = 1
    dp: int = 1
    spread: bool = True
    """Whether ranks have experts of their own (ep), or a part of each expert (tp)."""
    level: int = 1
    dispatcher: str = "auto"
    replicas: bool = False
    tokens: tuple[int, ...] = (5, 3)
    """Of each group of ranks that hold the same ones."""
    dtype: torch.dtype = torch.float32
    hidden: int = 128
    graphs: bool = False
    """Whether decoding is captured, and so may not ask the device anything."""

    @property
    def ep_size(self) -> int:
        return self.size if self.spread else 1

    @property
    def config(self) -> EPConfig:
        engine = {"dp": self.dp, "tp": 1 if self.spread else self.size, "eager_mode": not self.graphs}
        # The placement itself is handed over finished; the config says that there is one, and how tokens split.
        placement = {"split": "nearest", "file": "given"} if self.replicas else {}
        return EPConfig.load(
            {
                "device": self.device,
                "ep_size": self.ep_size,
                "ep_level": self.level,
                "dispatcher": self.dispatcher,
                "engine": engine,
                "placement": placement,
            }
        )


def cuda_case(form: str, **settings: Any) -> Case:
    """On device cuda, in float32 where the form of weights allows it."""
    dtype = torch.float32 if form == "float" else torch.bfloat16
    return Case(form, "cuda", dtype=dtype, **settings)


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    dispatcher: str | None
    """None: the rank has nothing to compute."""
    expert_list: list[int] | None
    kept: tuple[int, ...]
    """Values that LMDeploy's module still holds of each of its tensors."""
    load: LoadReport


def module_equals_reference(groups: dict[int, RankGroup], case: Case) -> Seen:
    """Fails unless the module gives this rank's tokens what one CPU rank with all experts gives them."""
    ranks = groups[case.size // case.dp]
    with built_for(case, ranks):
        place = place_of(get_device(case.device), ranks.rank)
        module, weights = load_module(case, place)
        hidden, ids, routed = batch_of(case, ranks.rank * case.dp // case.size)
        found = module(hidden.to(place), routed.to(place), ids.to(place)).cpu()
        state.active().stats_writer.step()
        state.active().stats_writer.close()
        layer = module.impl.layer
        seen = Seen(
            layer and layer.dispatchers["decode"].name,
            module.expert_list,
            tuple(each.numel() for each in module.parameters()),
            state.active().load_report(),
        )
    expected = answer(weights, hidden, ids, routed)
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    assert found.dtype == hidden.dtype
    assert found.shape == hidden.shape
    assert error < CLOSE[case.dtype], error
    return seen


@contextmanager
def built_for(case: Case, ranks: RankGroup) -> Iterator[None]:
    """The contexts in which LMDeploy builds and runs the models of one rank, our plug enabled."""
    tokens = DistGroup(ranks.token_rank, gpu_group=ranks.token_group)
    where = DistContext(
        rank=ranks.rank,
        ep_rank=ranks.rank,
        attn_tp_group=tokens,
        tp_group=tokens,
        mlp_tp_group=tokens,
        moe_tp_group=DistGroup() if case.spread else tokens,
        ep_gpu_group=ranks.group if case.spread else None,
        dist_config=DistConfig(dp=case.dp, ep=case.ep_size, tp=1 if case.spread else case.size),
    )
    steps = StepContextManager(BuildModelContext(max_batch_size=16))
    step = SimpleNamespace(global_is_decoding=lambda: True, is_dummy=False)
    placement = Placement((COPIES,) * (LAYER + 1)) if case.replicas else None
    plug.enable(case.config, placement)
    try:
        with ExitStack() as contexts:
            contexts.enter_context(get_device_manager().context(DeviceContext(case.device)))
            contexts.enter_context(get_dist_manager().context(where))
            contexts.enter_context(build_model_context(steps.build_ctx))
            contexts.enter_context(step_ctx_manager(steps))
            contexts.enter_context(steps.context(step))
            contexts.enter_context(building(LAYER))
            contexts.enter_context(torch.inference_mode())
            yield
    finally:
        plug.disable()


def needs_ray_for_dp() -> None:
    """Skips a test with dp > 1, which LMDeploy runs by Ray only: a GPU machine without network may not have it."""
    pytest.importorskip("ray", reason="ray, by which LMDeploy runs dp > 1, is not installed")


def load_module(case: Case, place: torch.device) -> tuple[nn.Module, tuple[Experts, Experts]]:
    """LMDeploy's module with made-up weights, all experts offered to every rank, and those weights."""
    draw, hidden = torch.Generator().manual_seed(0), case.hidden
    gate_up = (torch.randn(E, 2 * F, hidden, generator=draw) / hidden**0.5).to(case.dtype)
    down = (torch.randn(E, hidden, F, generator=draw) / F**0.5).to(case.dtype)
    sizes = {"hidden_dim": hidden, "ffn_dim": F, "num_experts": E, "top_k": K, "renormalize": True}
    common = sizes | {"dtype": case.dtype, "device": place}
    if case.form == "float":
        module = FusedMoE(**common, layer_idx=LAYER)
        weights: tuple[Experts, Experts] = (gate_up, down)
        _offer(module.gate_up.weight, module.down.weight, *weights)
    elif case.form == "fp8":
        module = FusedMoEBlockedF8(**common, layer_idx=LAYER)
        weights = Fp8Blocks.of(gate_up), Fp8Blocks.of(down)
        _offer(module.gate_up.weight, module.down.weight, *(each.values_LNK for each in weights))
        scales = (module.gate_up.weight_scale_inv, module.down.weight_scale_inv)
        _offer(*scales, *(each.scale_LBB for each in weights))
    else:
        module = FusedMoEW8A8(**common)
        weights = Int8Weights.of(gate_up), Int8Weights.of(down)
        _offer(module.gate_up.weight, module.down.weight, *(each.values_LNK for each in weights))
        _offer(module.gate_up.scale, module.down.scale, *(each.scale_LN.unsqueeze(2) for each in weights))
    module.update_weights()
    return module, weights


def _offer(gate_up: nn.Parameter, down: nn.Parameter, gate_up_E: Tensor, down_E: Tensor) -> None:
    """Hands every expert to the weight loaders, as the loader of a model does."""
    for expert in range(E):
        gate, up = gate_up_E[expert].chunk(2)
        gate_up.weight_loader(gate_up, gate, expert_id=expert, shard_id="gate")
        gate_up.weight_loader(gate_up, up, expert_id=expert, shard_id="up")
        down.weight_loader(down, down_E[expert], expert_id=expert, shard_id="down")


def batch_of(case: Case, source: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_TD, ids_TK and unnormalised weights_TK of the ranks that hold the same tokens, on the CPU."""
    draw = torch.Generator().manual_seed(1 + source)
    tokens = case.tokens[source]
    hidden = torch.randn(tokens, case.hidden, generator=draw).to(case.dtype)
    ids = torch.rand(tokens, E, generator=draw).argsort(1)[:, :K]
    return hidden, ids, torch.rand(tokens, K, generator=draw)


def answer(weights: tuple[Experts, Experts], hidden: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
    """What one rank with all experts makes of a batch, by the plain-torch kernels of the CPU."""
    layer = ExpertParallelMoE(
        *weights,
        slot_map=SlotMap.uniform(E, 1),
        ranks=RankGroup.single(),
        settings=DispatchSettings(),
        top_k=K,
    )
    return layer(hidden, ids, routed / routed.sum(1, keepdim=True))
