"""What can be known to be wrong with a model before any process is started for it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from epbackend.checkpoint import (
    dense_layers,
    expert_count,
    expert_width,
    layer_count,
    quantization,
    read_model_config,
)
from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.engines.lmdeploy.architectures import why_not
from epbackend.engines.lmdeploy.devices import dlinfer_package
from epbackend.engines.lmdeploy.lmdeploy_config import block_size, executor
from epbackend.engines.placement import finished_placement
from epbackend.errors import ConfigError, UnavailableError
from epbackend.names import FAST_FP8, LEVELLING
from epbackend.placement.placement import Placement
from epbackend.placement.renumbering import Renumbering

UNPATCHABLE_MODELS = {"DeepseekV4ForCausalLM"}
"""Models of LMDeploy whose experts have operators of their own, which no patch of ours reaches."""
GIB = 1 << 30
KEPT_FREE = 0.1
"""Share of the free memory that no cache may take: activations and the ranks' own needs."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCKED_FP8, W8A8 = "blocked FP8", "W8A8"
SPREAD: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": (BLOCKED_FP8, W8A8), "ascend": (W8A8,)}
"""device -> the quantized forms of experts that our operators have there."""
ASCEND_CHIPS = ("A2", "A3")
FIA_BLOCK, FIA_MOST = 128, 512
"""Blocks of the cache that a prefill of several tokens reads are multiples of the one, up to the other."""
MLA_SIZE, MLA_BLOCK = 576, 128
"""The longest key, and the most tokens in a block, of ATB's attention for MLA."""


def check_deployment(
    path: str, config: EPConfig, *, serving: bool, custom_models: bool = False
) -> Placement | None:
    """The finished placement, once all is known to be right that can be known before any process is started.

    `custom_models`: LMDeploy is told of models beside its own (custom_module_map).

    Raises:
        UnavailableError: the model, or a package or device that is needed, is not there.
        ConfigError: model, settings and placement do not suit each other, or memory does not suffice.
    """
    settings = read_model_config(Path(path))
    reason = why_not(settings, get_device(config.device).name)
    if reason and not custom_models:
        raise ConfigError(f"{path}: {reason}")
    renumbering = Renumbering.beside(path)
    placement = finished_placement(config, layer_count(settings), dense_layers(settings), renumbering)
    check_model(path, config, placement)
    check_packages(config, serving=serving)
    device = get_device(config.device).name
    if device == "ascend":
        check_ascend(settings, config)
    # Others are asked where LMDeploy checks its engine: asking takes some of their memory.
    if device == "cpu":
        check_cache(config)
    return placement


def check_model(path: str, config: EPConfig, placement: Placement | None = None) -> None:
    """Raises an error that says why the model in the directory `path` cannot run with `config` and a placement.

    Raises:
        UnavailableError: there is no model at the path.
        ConfigError: its form, its experts or their number, or its quantization do not suit the settings.
    """
    settings = read_model_config(Path(path))
    experts = expert_count(settings)
    check_adapters(config, config.engine.extra.get("adapters"))
    if config.ep_size > 1:
        if own := UNPATCHABLE_MODELS.intersection(settings.get("architectures") or []):
            raise ConfigError(
                f"ep_size: {config.ep_size}, but the FP4 experts of {', '.join(own)} are spread by LMDeploy's own rule "
                "and with DeepEP only; use ep_size: 1"
            )
        if experts is None:
            raise ConfigError(
                f"ep_size: {config.ep_size}, but {path} is a model without experts "
                f"({_architecture(settings)}): nothing can be spread; use a mixture-of-experts model, or ep_size: 1"
            )
        if placement is not None:
            _check_placement(placement, settings, path, config.ep_size)
        elif experts % config.ep_size:
            fitting = [str(size) for size in range(1, experts + 1) if experts % size == 0]
            raise ConfigError(
                f"ep_size: {config.ep_size} does not divide the {experts} experts of {path}; "
                f"use one of {', '.join(fitting)}, or a placement"
            )
    form = form_of_experts(settings)
    if form is not None:
        _check_form(form, config, path)
    if config.kernels == FAST_FP8 and form != BLOCKED_FP8:
        raise ConfigError(
            f"kernels: {FAST_FP8} is for {BLOCKED_FP8} experts, and {path} holds {form or 'unquantized'} ones; write "
            "triton, or auto"
        )


def check_graphs(config: EPConfig) -> None:
    """Raises ConfigError for kernels that wait for the host, where a decode step is captured in a CUDA graph."""
    replicas = config.placement.given or config.balance.on
    levelled = replicas and config.placement.split_of("decode") in LEVELLING
    waiting = config.kernels == "reference" or (config.kernels == "grouped_mm" and levelled)
    if waiting and config.captures_graphs:
        what = "multiply" if config.kernels == "reference" else "level a batch"
        raise ConfigError(
            f"kernels: {config.kernels} {what} with the host's help, which a CUDA graph cannot hold: set "
            "engine.eager_mode: true, or kernels: triton"
        )


def check_adapters(config: EPConfig, adapters: Any) -> None:
    """Raises ConfigError for LoRA adapters where LMDeploy's backend of the config's device has no operator for them."""
    device = get_device(config.device).name
    if adapters and device != "cuda":
        raise ConfigError(
            f"adapters: device {device} has no operators for LoRA; merge the adapter into the weights (peft's "
            "merge_and_unload), or use a GPU (device: cuda)"
        )


def check_packages(config: EPConfig, *, serving: bool) -> None:
    """Raises UnavailableError, naming them, where packages are missing that only some ways of running need."""
    device = get_device(config.device)
    if config.world_size > 1 and (reason := device.no_collectives()):
        raise UnavailableError(f"device {device.name} cannot run {config.world_size} ranks: {reason}")
    needed = ["ray"] if executor(config) == "ray" else []
    if serving:
        needed += ["uvicorn", "fastapi", "openai", "aiohttp"]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UnavailableError(f"{', '.join(missing)} must be installed: pip install 'epbackend[serve]'")


def check_ascend(settings: dict[str, Any], config: EPConfig) -> None:
    """Raises an error for what NPUs, or the dlinfer that is there, cannot serve of a model's config.json.

    Raises:
        UnavailableError: dlinfer is missing or too old, the chip is another one, or there are more ranks than NPUs.
        ConfigError: quantized experts, attention or blocks of the cache are in a form that nobody computes there.
    """
    dlinfer_package.check_version()
    older = dlinfer_package.lacks("attention")
    chip = get_device(config.device).chip
    if chip not in ASCEND_CHIPS:
        raise UnavailableError(
            f"device ascend is for the chips {' and '.join(ASCEND_CHIPS)}, and this one is {chip}"
        )
    devices, ranks = torch.get_device_module("npu").device_count(), config.world_size
    if ranks > devices and not _several_machines(config):
        raise UnavailableError(
            f"ep_size: {config.ep_size} takes {ranks} NPUs, and there are {devices} "
            "(ASCEND_RT_VISIBLE_DEVICES may hide some): lower it"
        )
    form = form_of_experts(settings)
    if form not in (None, *SPREAD["ascend"]) and expert_count(settings):
        raise ConfigError(
            f"device ascend: neither LMDeploy nor epbackend computes {form} experts there; take a checkpoint that is "
            f"unquantized or {' or '.join(SPREAD['ascend'])} (LMDeploy's smooth_quant)"
        )
    if form == W8A8 and _dtype(settings, config.engine.dtype) == "float16":
        raise ConfigError(
            "engine.dtype: float16, but dlinfer's linear_w8a8 gives bfloat16 in its place, which the layers behind it "
            "do not take: set engine.dtype: bfloat16"
        )
    if older:
        _check_older_attention(settings, config)


def _check_older_attention(settings: dict[str, Any], config: EPConfig) -> None:
    """Raises ConfigError for attention that dlinfer 0.2.7 does not compute, with what bridges it to LMDeploy."""
    block, latent = block_size(config), settings.get("kv_lora_rank")
    if settings.get("index_topk"):
        raise ConfigError(
            f"device ascend: {dlinfer_package.PACKAGE} {dlinfer_package.installed()} has no sparse attention "
            f"(lightning_indexer) for {_architecture(settings)}; take a model without it, such as DeepSeek-V3"
        )
    if latent and (size := latent + settings.get("qk_rope_head_dim", 0)) > MLA_SIZE:
        raise ConfigError(
            f"device ascend: kv_lora_rank and qk_rope_head_dim of {_architecture(settings)} are {size} together, and "
            f"attention takes {MLA_SIZE} (_npu_paged_attention_mla); take another model"
        )
    if latent and block != MLA_BLOCK:
        raise ConfigError(
            f"engine.block_size: {block}, but on device ascend MLA takes {MLA_BLOCK} (_npu_paged_attention_mla): set "
            f"engine.block_size: {MLA_BLOCK}"
        )
    if block % FIA_BLOCK or block > FIA_MOST:
        raise ConfigError(
            f"engine.block_size: {block}, but on device ascend a prefill beside its cache takes {FIA_BLOCK} to "
            f"{FIA_MOST} (npu_fused_infer_attention_score): set engine.block_size: {FIA_BLOCK}"
        )


def check_cache(config: EPConfig) -> None:
    """Raises ConfigError for a KV cache that is larger than the free memory of a device that this machine's ranks get.

    It asks each of these, which makes a context there, in the process that calls. On a CPU all ranks of the machine
    share one memory.
    """
    gigabytes = config.engine.cache_gb
    if gigabytes is None:
        return
    device = get_device(config.device)
    kind = device.torch_device(0).type
    here = 1 if kind == "cpu" else torch.get_device_module(kind).device_count()
    free, place = min((device.memory(rank).free, rank) for rank in range(min(here, config.world_size)))
    sharing, where = (ranks_sharing_memory(config), "") if kind == "cpu" else (1, f" on {kind}:{place}")
    usable = int(free * (1 - KEPT_FREE))
    if gigabytes * GIB * sharing > usable:
        setting = f"engine.cache_gb: {gigabytes:g} GiB a rank"
        raise ConfigError(too_large_cache(setting, gigabytes * GIB, usable, sharing, where))


def ranks_sharing_memory(config: EPConfig) -> int:
    """Ranks on CPUs that share the memory of one machine; over a cluster of Ray it is not known, and 1."""
    return 1 if _several_machines(config) else config.world_size


def too_large_cache(setting: str, wanted: float, usable: int, sharing: int, where: str = "") -> str:
    """The message about a KV cache of `wanted` bytes a rank, where `sharing` ranks have `usable` bytes together."""
    whose = "a rank's KV cache"
    if sharing > 1:
        setting += f", {wanted * sharing / GIB:.3g} GiB for the {sharing} ranks of this machine"
        whose = "their KV caches"
    return (
        f"{setting}: not enough memory, {usable / GIB:.2f} GiB are free{where} for {whose}; lower it to at most "
        f"{usable / sharing / GIB:.2f} GiB a rank"
    )


def _several_machines(config: EPConfig) -> bool:
    return executor(config) == "ray" and "RAY_ADDRESS" in os.environ


def form_of_experts(settings: dict[str, Any]) -> str | None:
    """The form that LMDeploy gives the experts of a model, from its config.json; None where they are not quantized."""
    if not (quantized := quantization(settings)):
        return None
    method = quantized.get("quant_method", "quantized")
    if method == "fp8" and quantized.get("fmt", "e4m3") == "e4m3":
        of_tensors = quantized.get("activation_scheme") == "static" and not quantized.get("weight_block_size")
        return "FP8 with one scale a tensor" if of_tensors else BLOCKED_FP8
    if method == "smooth_quant" and quantized.get("quant_dtype", "int8") == "int8":
        return W8A8
    return method


def _check_form(form: str, config: EPConfig, path: str) -> None:
    """Raises ConfigError for experts in a form that is not computed, or not spread, on the config's device."""
    device = get_device(config.device).name
    computed = SPREAD.get(device, ())
    if not computed:
        raise ConfigError(
            f"device: {device} computes unquantized weights only, and {path} holds {form} ones; "
            "use the original checkpoint"
        )
    if form not in computed and config.ep_size > 1:
        raise ConfigError(
            f"ep_size: {config.ep_size}, but {path} holds {form} experts, and on device {device} only unquantized and "
            f"{' and '.join(computed)} ones are spread; use such a checkpoint, or ep_size: 1"
        )


def expert_bytes(settings: dict[str, Any], dtype: str = "auto") -> int | None:
    """Bytes of one unquantized routed expert in a dtype, from the model's config.json; None where it does not say."""
    for level in (settings, settings.get("text_config") or {}):
        hidden = level.get("hidden_size")
        width = expert_width(level)
        kept = _dtype(level, dtype)
        if hidden and width and kept in ITEM_BYTES:
            return 3 * int(hidden) * int(width) * ITEM_BYTES[kept]
    return None


def _dtype(settings: dict[str, Any], dtype: str) -> str | None:
    """The type that a model is computed in, `auto` being that of its config.json; None where this does not say."""
    return settings.get("dtype") or settings.get("torch_dtype") if dtype == "auto" else dtype


def _check_placement(placement: Placement, settings: dict[str, Any], path: str, ep_size: int) -> None:
    """Raises ConfigError for a placement of another model or other ranks."""
    has = {"ranks": placement.ranks, "experts": placement.experts, "layers": len(placement.layers)}
    needed = {"ranks": ep_size, "experts": expert_count(settings), "layers": layer_count(settings)}
    of = {"ranks": "ep_size", "experts": path, "layers": f"{path} (dense layers count)"}
    for name in has:
        if has[name] != needed[name]:
            raise ConfigError(
                f"placement: it has {has[name]} {name}, but {needed[name]} are those of {of[name]}; plan one on loads "
                f"recorded with this model (epbackend record), for {ep_size} ranks"
            )


def _architecture(settings: dict[str, Any]) -> str:
    return ", ".join(settings.get("architectures") or []) or str(
        settings.get("model_type", "unknown architecture")
    )
