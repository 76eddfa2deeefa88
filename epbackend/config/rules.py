"""Rules between settings: what contradicts, and what has no effect."""

from typing import TYPE_CHECKING

from epbackend.config import parallel
from epbackend.config.base import Section
from epbackend.config.problems import Problem

if TYPE_CHECKING:
    from epbackend.config.settings import EPConfig

# The ep_level each dispatcher serves; their own classes import torch, which the configuration must not need.
LEVEL_OF_DISPATCHER = {"replicated": 1, "allgather": 1, "alltoall": 2, "mc2": 2, "symmetric": 2, "deepep": 2}
DECODE_ONLY = ("mc2",)
"""Dispatchers that serve a bounded number of tokens: prefill takes another, by itself."""


CUDA_KERNELS = ("triton", "grouped_mm")


def contradictions(config: "EPConfig") -> list[Problem]:
    """Settings, each valid by itself, that cannot stand together."""
    engine = config.engine
    return [
        *_cutoff(config),
        *_transport(config),
        *_kernels(config),
        *parallel.problems(config.ep_size, engine.tp, engine.dp, engine.executor),
        *_cache(config),
        *_placement(config),
    ]


def without_effect(config: "EPConfig") -> list[str]:
    """Settings that differ from their default and change nothing, one sentence each."""
    levels = {config.level("prefill"), config.level("decode")}
    found = []
    if config.enable_init_routing_cutoff and 1 not in levels:
        found.append("enable_init_routing_cutoff has no effect: it is for ep_level 1, which no phase uses")
    if _changed(config, "init_routing_cutoff_min_tokens") and not config.enable_init_routing_cutoff:
        found.append("init_routing_cutoff_min_tokens has no effect without enable_init_routing_cutoff: true")
    for name in ("alltoall_ep_buffer_scale_factors", "overlap_chunks", "overlap_min_tokens"):
        if _changed(config, name) and 2 not in levels:
            found.append(f"{name} has no effect: it is for ep_level 2, which no phase uses")
    if _changed(config, "transport") and _nothing_travels(config, levels):
        found.append("transport has no effect: every rank holds all tokens, so that no row travels")
    if _changed(config.engine, "cache_max_entry_count") and config.device == "cpu":
        found.append("engine.cache_max_entry_count has no effect on the CPU: set engine.cache_gb instead")
    if _changed(config.placement, "split") and not config.placement.given:
        found.append(
            "placement.split has no effect without placement.file or placement.loads: no expert has replicas"
        )
    return found


def _changed(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


def _nothing_travels(config: "EPConfig", levels: set[int]) -> bool:
    dispatchers = {config.dispatcher_of(phase) for phase in ("prefill", "decode")}
    replicated = levels == {1} and config.engine.dp == 1 and dispatchers <= {"auto", "replicated"}
    return config.ep_size == 1 or replicated


def _cutoff(config: "EPConfig") -> list[Problem]:
    factor, enabled = config.topk_scaling_factor, config.enable_init_routing_cutoff
    if factor is not None and not enabled:
        remedy = "needs its switch: set enable_init_routing_cutoff: true, or remove it"
        return [Problem("topk_scaling_factor", remedy, factor)]
    if enabled and factor is None:
        remedy = "needs topk_scaling_factor, a number in (0, 1]"
        return [Problem("enable_init_routing_cutoff", remedy, enabled)]
    return []


def _kernels(config: "EPConfig") -> list[Problem]:
    if config.kernels not in CUDA_KERNELS or config.device in ("auto", "cuda"):
        return []
    remedy = f"are for device cuda, but device is {config.device}: write auto or reference"
    return [Problem("kernels", remedy, config.kernels)]


def _transport(config: "EPConfig") -> list[Problem]:
    if (config.device, config.transport) != ("ascend", "fp8"):
        return []
    return [
        Problem("transport", "needs float8, which Ascend A2 and A3 do not have: write int8 or full", "fp8")
    ]


def _cache(config: "EPConfig") -> list[Problem]:
    blocks = config.engine.cache_blocks
    if blocks is None or config.engine.cache_gb is None:
        return []
    return [Problem("engine.cache_blocks", "and engine.cache_gb both size the KV cache: keep one", blocks)]


PLANNING = ("algorithm", "redundant_experts", "budget", "objective", "search_ms")


def _placement(config: "EPConfig") -> list[Problem]:
    placement = config.placement
    planning = [name for name in PLANNING if _changed(placement, name)]
    found = []
    if placement.file is not None:
        for name in [*(["loads"] if placement.loads else []), *planning]:
            reason = "is for planning, but placement.file is a finished placement: keep one of them"
            found.append(Problem(f"placement.{name}", reason, getattr(placement, name)))
    elif not placement.loads:
        for name in [*planning, *(["node_size"] if placement.node_size else [])]:
            reason = "has nothing to work on: give recorded loads as placement.loads, or a placement.file"
            found.append(Problem(f"placement.{name}", reason, getattr(placement, name)))
    if placement.budget is not None and placement.redundant_experts is not None:
        reason = "is for all layers together, placement.redundant_experts for each: keep one of them"
        found.append(Problem("placement.budget", reason, placement.budget))
    if placement.given and config.ep_size == 1:
        reason = "needs ranks to place experts on: set ep_size, or remove the section"
        found.append(Problem("placement", reason))
    if placement.node_size and config.ep_size % placement.node_size:
        reason = f"must divide ep_size {config.ep_size}"
        found.append(Problem("placement.node_size", reason, placement.node_size))
    return found
