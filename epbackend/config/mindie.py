"""Translates MindIE's server `config.json`: maps what has a counterpart here, and names every key that it ignores.

Source of the keys and their meaning: MindIE LLM's developer guide, "Configuration Parameters
(Service-Specific)", "Configuration Parameters (Model Side)" and "Expert Parallel".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from epbackend.config.issues import NO_VALUE, ConfigIssue, config_error
from epbackend.errors import did_you_mean

SIZE_KEYS = ("worldSize", "dp", "tp", "cp", "pp", "moe_ep", "moe_tp")
"""MindIE divides the cards twice: `cp * dp * tp = worldSize` for attention, `moe_ep * moe_tp = worldSize` for experts;
-1 or a missing key means what is left. Over several nodes worldSize counts the cards of one node."""
# MindIE's section and key -> the setting of ours that takes the value as it is.
COUNTERPARTS = {
    ("ModelDeployConfig", "maxSeqLen"): "engine.session_len",
    ("ScheduleConfig", "maxBatchSize"): "engine.max_batch_size",
    ("ScheduleConfig", "maxPrefillTokens"): "engine.max_prefill_token_num",
    ("ScheduleConfig", "cacheBlockSize"): "engine.block_size",
    ("models", "ep_level"): "ep_level",
    ("models", "enable_init_routing_cutoff"): "enable_init_routing_cutoff",
    ("models", "topk_scaling_factor"): "topk_scaling_factor",
    ("models", "alltoall_ep_buffer_scale_factors"): "alltoall_ep_buffer_scale_factors",
}
WHY_IGNORED = {
    "communication_backend": "collectives are HCCL's, or those of the fused operators",
    "mix_shared_routing": "shared experts are no routed ones here: each rank computes them for its own tokens",
    "num_dangling_shared_experts": "no rank has shared experts alone: each computes them for its own tokens",
    "mlp_full_tp": "LMDeploy decides how dense layers are split",
    "parallel_options": "LMDeploy decides how dense layers are split; HCCL's buffers are set by HCCL_BUFFSIZE",
    "h3p": "it arranges MindIE's own attention and gating",
    "ccl": "the fused operators serve decode (dispatcher mc2)",
    "enable_gmmswigluquant": "our kernels decide by the form of the weights",
    "enable_swiglu_quant_for_shared_experts": "shared experts are LMDeploy's",
    "enable_oproj_prefetch": "it is for MindIE's own attention",
    "enable_mlapo_prefetch": "it is for MindIE's own attention",
}
"""Settings of a model family that concern expert parallelism, and why nothing is made of them."""
EP_SECTIONS = ("enable_dispatch_combine_v2", "eplb")
# Keys that the functions below read in their own way.
READ_OTHERWISE = {
    "top level": {"BackendConfig"},
    "BackendConfig": {"ModelDeployConfig", "ScheduleConfig", "multiNodesInferEnabled"},
    "ModelDeployConfig": {"ModelConfig"},
    "ModelConfig": {*SIZE_KEYS, "models", "modelWeightPath", "npuMemSize", "plugin_params"},
    "models": {*EP_SECTIONS, *WHY_IGNORED},
}
EPLB_OF_LEVEL_2 = ("aggregate_threshold", "buffer_expert_layer_num", "num_expert_update_ready_countdown")
GENERAL_FAMILY = "llm"
"""Settings of all families, under those of the one that is served."""
MARKS = ("BackendConfig", "ModelDeployConfig", "ModelConfig", "worldSize", "models")
EP_SETTINGS = [key for section, key in COUNTERPARTS if section == "models"]

Sections = dict[str, Mapping[str, Any]]


class MindIEKeyError(Exception):
    """A key of a MindIE file that is malformed, contradicts another, or asks for what LMDeploy cannot do."""

    def __init__(self, key: str, message: str, value: Any) -> None:
        super().__init__(key)
        self.issue = ConfigIssue(key, message, value)


@dataclass
class Translation:
    """A MindIE file in our terms.

    settings: what EPConfig validates.
    origins: our setting (dotted) -> MindIE's key, so that an error can name what the user wrote.
    notes: what was ignored or reads differently here.
    """

    settings: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, setting: str, value: Any, origin: str) -> None:
        """Sets a setting of ours and remembers the key of MindIE's it comes from."""
        section, _, name = setting.rpartition(".")
        (self.settings[section] if section else self.settings)[name] = value
        self.origins[setting] = origin

    def note(self, text: str) -> None:
        self.notes.append(f"MindIE config: {text}")


def is_mindie(content: Mapping[str, Any]) -> bool:
    """Whether a mapping is MindIE's file, or the part of it from one of its inner sections down."""
    return any(key in content for key in MARKS)


def translate(content: Mapping[str, Any], source: str | None = None) -> Translation:
    """MindIE's file as settings of ours.

    Raises:
        ConfigError: the nesting is not MindIE's, its sizes contradict each other, or LMDeploy cannot run them.
    """
    translation = Translation(settings={"device": "ascend", "engine": {}})
    try:
        sections = _sections(content)
        for (section, key), setting in COUNTERPARTS.items():
            if key in sections[section]:
                translation.take(setting, sections[section][key], f"{section}.{key}")
        _take_sizes(sections, translation)
        _take_model_settings(sections["ModelConfig"], translation)
        _adapt_ep_settings(translation)
        _take_dispatch(sections["models"], translation)
        _take_balance(sections["models"], translation)
    except MindIEKeyError as error:
        raise config_error([error.issue], source) from None
    _note_ignored(sections, translation)
    return translation


def _sections(content: Mapping[str, Any]) -> Sections:
    """MindIE's nested sections side by side."""
    whole = _with_outer_sections(content)
    backend = _inner(whole, "BackendConfig")
    deploy = _inner(backend, "ModelDeployConfig")
    model = _only_model(deploy.get("ModelConfig"))
    return {
        "top level": whole,
        "BackendConfig": backend,
        "ModelDeployConfig": deploy,
        "ModelConfig": model,
        "ScheduleConfig": _inner(backend, "ScheduleConfig"),
        "models": _only_family(_inner(model, "models")),
    }


def _with_outer_sections(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A fragment, as MindIE's documentation prints them, put back into the sections around it."""
    if "worldSize" in content or "models" in content:
        content = {"ModelConfig": [content]}
    if "ModelConfig" in content:
        content = {"ModelDeployConfig": content}
    if "ModelDeployConfig" in content:
        content = {"BackendConfig": content}
    return content


def _inner(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = section.get(key, {})
    if not isinstance(value, Mapping):
        raise MindIEKeyError(key, "must be an object, as in MindIE's own file", value)
    return value


def _only_model(models: Any) -> Mapping[str, Any]:
    """The one entry of the ModelConfig list."""
    if not isinstance(models, list) or len(models) != 1 or not isinstance(models[0], Mapping):
        raise MindIEKeyError(
            "BackendConfig.ModelDeployConfig.ModelConfig", "must be a list of one model", models
        )
    return models[0]


def _only_family(families: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the model family (`deepseekv2`, ...): the only one, or the only one that sets EP."""
    blocks = {name: _inner(families, name) for name in families}
    general = blocks.pop(GENERAL_FAMILY, {})
    if len(blocks) > 1:
        blocks = {
            name: block for name, block in blocks.items() if {*EP_SETTINGS, *EP_SECTIONS} & block.keys()
        }
    if len(blocks) > 1:
        raise MindIEKeyError(
            "ModelConfig.models",
            "sets expert parallelism for several families: keep the one you serve",
            list(blocks),
        )
    return {**general, **next(iter(blocks.values()), {})}


def _take_sizes(sections: Sections, translation: Translation) -> None:
    several_nodes = sections["BackendConfig"].get("multiNodesInferEnabled") is True
    sizes = parallel_sizes(sections["ModelConfig"], several_nodes)
    translation.take("ep_size", sizes.ep, "ModelConfig.moe_ep")
    translation.take("engine.dp", sizes.dp, "ModelConfig.dp")
    translation.take("engine.tp", sizes.tp, "ModelConfig.tp")
    if sizes.ep == 1 and sections["models"].keys() & set(EP_SETTINGS):
        translation.note("moe_ep is not set: the experts are not spread (ep_size 1)")
    if several_nodes:
        translation.take("engine.executor", "ray", "BackendConfig.multiNodesInferEnabled")
        translation.note(
            "multiNodesInferEnabled: Ray starts all ranks; worldSize and the rank table are not read"
        )


def _take_model_settings(model: Mapping[str, Any], translation: Translation) -> None:
    if model.get("npuMemSize", -1) != -1:
        translation.take("engine.cache_gb", model["npuMemSize"], "ModelConfig.npuMemSize")
    if path := model.get("modelWeightPath"):
        translation.note(f"modelWeightPath is not a setting here: give the command its MODEL, {path}")
    plugins = _plugins(model)
    if "prefix_cache" in plugins:
        translation.take("engine.enable_prefix_caching", True, "ModelConfig.plugin_params")
    if others := [name for name in plugins if name != "prefix_cache"]:
        translation.note(f"ignored, no counterpart (plugin_params): {', '.join(others)}")


def _plugins(model: Mapping[str, Any]) -> list[str]:
    """The names in plugin_params, JSON inside a string: `{"plugin_type": "mtp,prefix_cache", ...}`."""
    text = model.get("plugin_params") or "{}"
    try:
        names = json.loads(text).get("plugin_type", "")
        return [name.strip() for name in names.split(",") if name.strip()]
    except (TypeError, ValueError, AttributeError):
        raise MindIEKeyError(
            "ModelConfig.plugin_params", "must be a JSON object inside a string", text
        ) from None


def _adapt_ep_settings(translation: Translation) -> None:
    """Two forms of MindIE's that mean something else than our names say."""
    settings = translation.settings
    if settings.get("ep_level") == 3:
        settings["ep_level"] = {"prefill": 2, "decode": 1}
        translation.note("ep_level 3 is MindIE's mix: ep_level 2 for prefill, 1 for decode")
    if settings.get("enable_init_routing_cutoff") is False and "topk_scaling_factor" in settings:
        factor = settings.pop("topk_scaling_factor")
        translation.note(f"topk_scaling_factor {factor} has no effect: enable_init_routing_cutoff is false")


def _take_dispatch(family: Mapping[str, Any], translation: Translation) -> None:
    """enable_dispatch_combine_v2: the fused operators of decode, which are taken by themselves where they can serve."""
    fused = family.get("enable_dispatch_combine_v2", True)
    if type(fused) is not bool:
        raise MindIEKeyError("enable_dispatch_combine_v2", "must be true or false", fused)
    level = translation.settings.get("ep_level", 1)
    decode = level.get("decode") if isinstance(level, Mapping) else level
    if not fused and decode == 2:
        dispatcher = {"prefill": "auto", "decode": "alltoall"}
        translation.take("dispatcher", dispatcher, "models.enable_dispatch_combine_v2")


def _take_balance(family: Mapping[str, Any], translation: Translation) -> None:
    """MindIE's eplb: level 0 off, 1 static, 2 dynamic, 3 a mock."""
    eplb = _inner(family, "eplb")
    level, file = eplb.get("level", 0), eplb.get("expert_map_file")
    if type(level) is not int or level not in (0, 1, 2, 3):
        raise MindIEKeyError("eplb.level", "must be 0 (off), 1 (static), 2 (dynamic) or 3 (forced)", level)
    if level == 1 and not file:
        raise MindIEKeyError(
            "eplb.expert_map_file", "is needed by eplb.level 1: name a table, or write level 0", file
        )
    if level in (1, 2) and file:
        translation.settings.setdefault("placement", {})
        translation.take("placement.file", file, "models.eplb.expert_map_file")
    if level == 2:
        translation.note(
            "eplb.level 2 (dynamic): the experts stay where "
            + ("eplb.expert_map_file has them" if file else "they are in order")
        )
    if level == 3:
        translation.note("eplb.level 3 forces a balance that the router did not choose, to measure: ignored")
    if level in (1, 2) and eplb.get("num_redundant_experts"):
        translation.note("eplb.num_redundant_experts is not read: eplb.expert_map_file says it")
    if level == 0 and file:
        translation.note("eplb.expert_map_file has no effect: eplb.level is 0")
    if others := [key for key in EPLB_OF_LEVEL_2 if key in eplb]:
        translation.note(f"ignored, they are for eplb.level 2 (eplb): {', '.join(others)}")
    known = ("level", "expert_map_file", "num_redundant_experts", *EPLB_OF_LEVEL_2)
    if others := [key + did_you_mean(key, known) for key in eplb if key not in known]:
        translation.note(f"ignored, no counterpart (eplb): {', '.join(others)}")


def _note_ignored(sections: Sections, translation: Translation) -> None:
    """One note for each section with keys that nothing above has read."""
    families = sections["ModelConfig"].get("models", {})
    used = sections["models"].items()
    if others := [name for name, block in families.items() if not block.items() <= used]:
        translation.note(f"ignored, sets no expert parallelism (models): {', '.join(others)}")
    for key in sections["models"].keys() & WHY_IGNORED.keys():
        if sections["models"][key]:  # what is off asks for nothing
            translation.note(f"{key} is ignored: {WHY_IGNORED[key]}")
    for section, content in sections.items():
        read = {key for where, key in COUNTERPARTS if where == section} | READ_OTHERWISE.get(section, set())
        known = EP_SETTINGS if section == "models" else ()
        ignored = [key + did_you_mean(key, known) for key in content if key not in read]
        if ignored:
            translation.note(f"ignored, no counterpart ({section}): {', '.join(ignored)}")


class Sizes(NamedTuple):
    """ep: expert-parallel ranks; dp: attention groups; tp: as `engine.tp` wants it."""

    ep: int
    dp: int
    tp: int


def parallel_sizes(model: Mapping[str, Any], several_nodes: bool) -> Sizes:
    """The sizes that a ModelConfig entry asks for, in LMDeploy's terms.

    Raises:
        MindIEKeyError: the products contradict each other, or LMDeploy cannot run them (cp, pp, moe_ep with moe_tp).
    """
    for key, meaning in (("cp", "context"), ("pp", "pipeline")):
        if (_size(model, key) or 1) > 1:
            raise MindIEKeyError(
                key, f"{meaning} parallelism has no counterpart: write 1 and raise tp or dp", model[key]
            )
    dp = _size(model, "dp") or 1
    tp, moe_ep, moe_tp = (_size(model, key) for key in ("tp", "moe_ep", "moe_tp"))
    world = None if several_nodes else _size(model, "worldSize")
    if world is None:
        world = _world_without_world_size(dp, tp, moe_ep, moe_tp, several_nodes)
    _check_product(world, {"dp": dp, "tp": tp or world // dp})
    if moe_ep is None:
        moe_ep = world // moe_tp if moe_tp else 1
    moe_tp = moe_tp or world // moe_ep
    _check_product(world, {"moe_ep": moe_ep, "moe_tp": moe_tp})
    if moe_ep > 1 and moe_tp > 1:
        raise MindIEKeyError(
            "moe_tp",
            f"LMDeploy cannot split experts that moe_ep spreads: set moe_ep {world} and moe_tp 1",
            moe_tp,
        )
    return Sizes(ep=moe_ep, dp=dp, tp=1 if dp > 1 or moe_ep > 1 else world)


def _size(model: Mapping[str, Any], key: str) -> int | None:
    value = model.get(key, -1)
    if type(value) is not int or (value < 1 and value != -1):
        raise MindIEKeyError(
            key, "must be a whole number of ranks, at least 1, or -1 for MindIE's default", value
        )
    return None if value == -1 else value


def _world_without_world_size(
    dp: int, tp: int | None, moe_ep: int | None, moe_tp: int | None, several_nodes: bool
) -> int:
    if tp:
        return dp * tp
    if moe_ep:
        return moe_ep * (moe_tp or 1)
    if several_nodes:
        raise MindIEKeyError(
            "worldSize", "counts one node only with multiNodesInferEnabled: write tp or moe_ep", NO_VALUE
        )
    return dp


def _check_product(world: int, factors: Mapping[str, int]) -> None:
    (first, a), (second, b) = factors.items()
    if a * b != world:
        raise MindIEKeyError(
            first, f"{first} * {second} must be {world}, the number of ranks, and {second} is {b}", a
        )
