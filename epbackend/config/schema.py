"""The fields of every section of a configuration: types, ranges, defaults, and a description of each.

What one field alone can get wrong is checked here; what fields say together is in `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PlainSerializer,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from epbackend.config.issues import UNION_TAGS
from epbackend.config.lmdeploy_fields import ENGINE_CONFIGS, unknown_engine_fields
from epbackend.dispatch.settings import DispatchSettings
from epbackend.errors import ConfigError, did_you_mean
from epbackend.names import (
    AUTO,
    DEVICES,
    DISPATCHERS,
    PLANNERS,
    SPLITS,
    KernelsName,
    NameTable,
    Phase,
    SplitName,
    dispatcher_names,
)
from epbackend.placement.speeds import parse_speeds

_DEFAULTS = DispatchSettings()
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
FEWEST_BLOCKS = 16
"""Of a KV cache that LMDeploy works with."""


class Section(BaseModel):
    """A frozen group of settings: no unknown key, no silent conversion, a description on every field."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


# Three settings have one value for both phases, or one for each: `ep_level: 2`, `ep_level: {prefill: 2, decode: 1}`.
_ONE, _EACH = UNION_TAGS
_one_or_each = Discriminator(lambda value: _EACH if isinstance(value, Mapping | Section) else _ONE)


def of_phase(value: Any, phase: Phase) -> Any:
    """The value of one phase, where a setting has one for both or one for each."""
    return getattr(value, phase) if isinstance(value, Section) else value


def _check_name(name: str, table: NameTable, *others: str) -> str:
    """The name, if it is in the table or one of the others; a package that adds it is not imported."""
    if name not in (*others, *table.built_in) and name not in (known := (*others, *table.names())):
        raise ValueError(f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
    return name


def _level(value: Any) -> Any:
    if type(value) is not int or value not in (1, 2):
        raise ValueError(
            "must be 1 (experts reached by all-gather) or 2 (by all-to-all), "
            "or one of them for each phase: {prefill: 2, decode: 1}"
        )
    return value


Level = Annotated[Literal[1, 2], BeforeValidator(_level)]


class PhaseLevels(Section):
    """An `ep_level` for each phase."""

    prefill: Level = Field(description="ep_level while prompts are read (many tokens a step).")
    decode: Level = Field(description="ep_level while answers are written (one token a request and step).")


def _dispatchers(value: Any) -> Any:
    """One name, names separated by commas, or a list of names, as a tuple; an empty one for `auto`."""
    names = dispatcher_names(value) if isinstance(value, str) else value
    if names == ():
        return ()
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("must be a dispatcher's name, or names in order of preference")
    for name in names:
        _check_name(name, DISPATCHERS, AUTO)
    if len(names) > 1 and (AUTO in names or len(set(names)) < len(names)):
        raise ValueError("must name each dispatcher once, and auto alone")
    return tuple(name for name in names if name != AUTO)


def _dispatchers_as_text(names: tuple[str, ...]) -> str:
    return ", ".join(names) or AUTO


Dispatchers = Annotated[
    tuple[str, ...],
    BeforeValidator(_dispatchers),
    PlainSerializer(_dispatchers_as_text, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class PhaseDispatchers(Section):
    """A `dispatcher` for each phase."""

    prefill: Dispatchers = Field(description="dispatcher while prompts are read (many tokens a step).")
    decode: Dispatchers = Field(
        description="dispatcher while answers are written (one token a request and step)."
    )


def _split(value: Any) -> Any:
    if value not in SPLITS:
        raise ValueError(
            f"must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, "
            "or one of them for each phase: {prefill: level, decode: nearest}"
        )
    return value


Split = Annotated[SplitName, BeforeValidator(_split)]


class PhaseSplits(Section):
    """A `split` for each phase."""

    prefill: Split = Field(description="split while prompts are read (many tokens a step).")
    decode: Split = Field(description="split while answers are written (one token a request and step).")


def _files(value: Any) -> Any:
    """One file, or a list of them, as the tuple that strict validation asks for."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be a list of file names")
    return tuple(value)


def _speeds(value: Any) -> Any:
    """A list, as files have it, is as good as a tuple; a text names a file with it."""
    if isinstance(value, str):
        try:
            return parse_speeds(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("rank_speed: ")) from None
    return tuple(value) if isinstance(value, list) else value


class PlacementSettings(Section):
    """Where the experts live; without `file` and `loads` each has one place, in order of their numbers."""

    file: str | None = Field(
        default=None,
        description="A placement, in any format that epbackend convert reads. Instead of loads.",
    )
    loads: Annotated[tuple[str, ...], BeforeValidator(_files)] = Field(
        default=(),
        description="Recorded loads (epbackend record) to plan a placement on, once, before the ranks start.",
    )
    algorithm: str | None = Field(
        default=None,
        examples=["refined", "omni", "eplb", "lplb"],
        description="Who plans. Unset: refined. A package adds names by entry points of the group "
        "epbackend.planners.",
    )
    redundant_experts: NotNegative | None = Field(
        default=None,
        description="Slots of each layer beyond one an expert. ep_size must divide the slots.",
    )
    budget: NotNegative | None = Field(
        default=None,
        description="Redundant slots of all layers together, given to layers by need. Instead of redundant_experts.",
    )
    objective: str = Field(
        default="tokens",
        description="What planning balances: tokens, activated, or a JSON file with measured times.",
    )
    rank_speed: Annotated[
        tuple[float, ...],
        BeforeValidator(_speeds),
        WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}),
    ] = Field(
        default=(),
        examples=[(1, 1, 0.5, 1), "calibration.json"],
        description="How fast each rank is, in any unit, or the file that epbackend calibrate wrote: planning, and the "
        "splits that level, balance times, load over speed. Unset: those that the file was planned for, or all alike.",
    )
    search_ms: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Milliseconds that planning may search on for in each layer.",
    )
    node_size: NotNegative = Field(
        default=0,
        description="Ranks of a node, which split prefers to others. It must divide ep_size. 0: those of the "
        "file, or all.",
    )
    split: Annotated[
        Annotated[Split, Tag(_ONE)] | Annotated[PhaseSplits, Tag(_EACH)],
        _one_or_each,
    ] = Field(
        default="even",
        description="Which replica a token takes: each in turn (even), the nearest, or the one that levels the ranks' "
        "load (level; one small collective a layer), and as far as that allows on its node (level_by_node). One for "
        "each phase: {prefill: level, decode: nearest}. Where both level, refined plans for that.",
    )

    @property
    def given(self) -> bool:
        """Whether there is anything to place by."""
        return self.file is not None or bool(self.loads)

    def split_of(self, phase: Phase) -> str:
        """The split of a phase."""
        return of_phase(self.split, phase)

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, name: str | None) -> str | None:
        return name if name is None else _check_name(name, PLANNERS)


class BalanceSettings(Section):
    """Moving experts while serving (docs/balance.md)."""

    on: bool = Field(
        default=False,
        description="Watch the experts' load while serving, plan anew where it pays, and move experts between ranks "
        "meanwhile. With ep_size > 1.",
    )
    redundant_experts: NotNegative = Field(
        default=0,
        description="Slots of each layer beyond one an expert, where placement plans none. ep_size must divide the "
        "slots. 0: experts only change places.",
    )
    phases: Literal["both", "prefill", "decode"] = Field(
        default="both",
        description="Whose load is planned for: prompts (prefill), answers (decode), or all tokens alike.",
    )
    window_steps: Positive = Field(
        default=64, description="Steps of the engine whose load is judged together, at least."
    )
    interval_s: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="Seconds between two looks at the load; what was moved counts anew."
    )
    threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05,
        description="A layer changes where that saves more than this share of its experts' time.",
    )
    speed_margin: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Measure from the steps how fast ranks are, and plan by other speeds once they have changed by "
        "this share. On the CPU. Unset: ranks keep the speeds of placement.rank_speed.",
    )
    max_slots: Positive | None = Field(
        default=None, description="The most slots that one plan may change. Unset: as many as pay."
    )
    max_mb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="The most megabytes of experts that one plan may move. Unset: as many as pay.",
    )
    staging_mb: Annotated[float, Field(gt=0)] = Field(
        default=256.0,
        description="Memory of each rank for experts on their way, in MB. What does not fit at once moves in parts.",
    )
    checksum: Literal["all", "sampled", "none"] = Field(
        default="all",
        description="Which experts are compared on arrival with what was sent; sampled: one of eight, by turns.",
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=30.0,
        description="Seconds in which all ranks must have a layer's experts. Otherwise the layer stays as it is.",
    )
    record: str | None = Field(
        default=None,
        examples=["loads.json", "loads-{phase}.json"],
        description="A file for the loads of the windows, at most 32 of them, of the phases that are planned for; with "
        "{phase} in its name one for each phase. plan, compare and simulate read it.",
    )


class EngineSettings(Section):
    """LMDeploy's engine, in the names a user of it knows; `extra` reaches every other field of its config."""

    backend: Literal["pytorch", "turbomind"] = Field(
        default="pytorch",
        description="Which engine of LMDeploy runs. turbomind (CUDA) spreads experts by itself, in blocks of their "
        "order: balance it by epbackend renumber. It takes none of the settings of dispatch, placement and balance.",
    )
    tp: Positive = Field(
        default=1,
        description="Tensor-parallel ranks, where ep_size is 1. With ep_size > 1 attention gets ep_size "
        "// dp ranks by itself: write 1, or ep_size.",
    )
    dp: Positive = Field(
        default=1,
        description="Attention groups, each with its own requests. More than 1 must divide ep_size, and "
        "needs Ray.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights and activations. auto takes the checkpoint's.",
    )
    session_len: Positive | None = Field(
        default=None,
        description="Longest prompt plus answer, in tokens. Unset: the model's own limit.",
    )
    max_batch_size: Positive | None = Field(
        default=None,
        description="Requests decoded together; more wait in line. Unset: LMDeploy's choice for the device.",
    )
    max_prefill_token_num: Positive = Field(
        default=8192,
        description="Tokens prefilled in one step. Longer prompts are prefilled in chunks.",
    )
    cache_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="KV-cache memory of one rank, in GiB. Unset: 1 GiB on the CPU, "
        "cache_max_entry_count elsewhere.",
    )
    cache_blocks: Annotated[int, Field(ge=FEWEST_BLOCKS)] | None = Field(
        default=None,
        description="KV cache of one rank, in blocks. Instead of cache_gb.",
    )
    cache_max_entry_count: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8,
        description="Share of free accelerator memory for the KV cache. Not used on the CPU.",
    )
    block_size: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="Tokens in a block of the KV cache, a power of two. Unset: 64, on Ascend 128.",
    )
    enable_prefix_caching: bool = Field(
        default=False,
        description="Share the KV cache of prompts that begin alike.",
    )
    eager_mode: bool = Field(
        default=False, description="Run without captured graphs; the CPU and Ascend always do."
    )
    executor: Literal["auto", "uni", "mp", "ray"] = Field(
        default="auto",
        description="How ranks are started; uni is one process. auto: uni for one rank, ray for dp > 1, "
        "else mp.",
    )
    threads_per_rank: Positive | None = Field(
        default=None,
        description="CPU threads of one rank. Unset: the machine's cores divided among its ranks.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="WARNING",
        description="Level of LMDeploy's log and of ours.",
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="More fields of LMDeploy's PytorchEngineConfig, or TurbomindEngineConfig. Passed on as they are; "
        "names are checked where LMDeploy is installed.",
    )

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, block_size: int | None) -> int | None:
        if block_size and block_size & (block_size - 1):
            raise ValueError("must be a power of two, for example 16, 64 or 128")
        return block_size

    @field_validator("extra")
    @classmethod
    def _known_to_lmdeploy(cls, extra: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        config, set_by_us = ENGINE_CONFIGS[info.data.get("backend", "pytorch")]
        for name in extra:
            if name in set_by_us:
                raise ValueError(f"{name} is set by epbackend: use {set_by_us[name]} instead")
        if unknown := unknown_engine_fields(extra, config):
            raise ValueError("; ".join(unknown))
        return extra


def _pairs(value: Any) -> Any:
    """Lists as tuples, which strict validation asks for."""
    if not isinstance(value, list | tuple) or not all(isinstance(pair, list | tuple) for pair in value):
        raise ValueError("must be a list of [length, scale] pairs, for example [[8192, 2.0], [0, 8.0]]")
    return tuple(tuple(pair) for pair in value)


BufferFactor = tuple[NotNegative, Annotated[float, Field(gt=0)]]


class Settings(Section):
    """The fields of `EPConfig`."""

    device: str = Field(
        default=AUTO,
        examples=[AUTO, *DEVICES.built_in],
        description="Where experts run. A package adds names by entry points of the group epbackend.devices.",
    )
    kernels: KernelsName = Field(
        default="auto",
        description="Who multiplies. auto: the device's own kernels, on cuda triton. triton_fast_fp8 sums float8 "
        "products with fewer bits, for models in FP8 on cuda. grouped_mm is torch's product, for cuda. reference is "
        "plain torch: for checks, slow.",
    )
    check_expert_ids: bool = Field(
        default=True,
        description="Report a router that chooses experts that do not exist. Nothing waits for a GPU to do so.",
    )
    ep_size: Positive = Field(
        default=1,
        description="Expert-parallel ranks; the experts are divided among them. MindIE's name for it: "
        "moe_ep.",
    )
    ep_level: Annotated[
        Annotated[Level, Tag(_ONE)] | Annotated[PhaseLevels, Tag(_EACH)],
        _one_or_each,
    ] = Field(
        default=1,
        description="Rows travel by all-gather (1) or all-to-all (2). One for each phase: {prefill: 2, "
        "decode: 1}.",
    )
    dispatcher: Annotated[
        Annotated[Dispatchers, Tag(_ONE)] | Annotated[PhaseDispatchers, Tag(_EACH)],
        _one_or_each,
    ] = Field(
        default=(),
        examples=[AUTO, *DISPATCHERS.built_in, "names in order of preference", "one for each phase"],
        json_schema_extra={"default": AUTO},
        description="How rows travel. auto takes the best that can serve the ep_level here, and says why. "
        "What is named is taken, or the next one named (symmetric, alltoall), or it is an error. "
        "mc2 serves decode only. A package adds names by entry points of the group epbackend.dispatchers.",
    )
    enable_init_routing_cutoff: bool = Field(
        default=False,
        description="ep_level 1: bound the expanded rows held at once. The rest goes in further passes, "
        "so no row is lost. Needs topk_scaling_factor.",
    )
    topk_scaling_factor: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="The cutoff's share of the top-k rows in one pass.",
    )
    init_routing_cutoff_min_tokens: Positive = Field(
        default=_DEFAULTS.cutoff_min_tokens,
        description="Tokens that the cutoff's bound counts at least. Shorter batches take one pass. The "
        "default is MindIE's constant.",
    )
    alltoall_ep_buffer_scale_factors: Annotated[tuple[BufferFactor, ...], BeforeValidator(_pairs)] = Field(
        default=(),
        description="ep_level 2: [length, scale] pairs that bound receive buffers. Lengths descend; the "
        "first that is at most this rank's tokens gives rows * scale, no match ep_size * "
        "rows. What exceeds it goes in further rounds. Empty: exact sizes, one round.",
    )
    overlap_chunks: Positive = Field(
        default=_DEFAULTS.overlap_chunks,
        description="ep_level 2: chunks that a long batch is cut into. One travels while another is "
        "computed. 1: no overlap.",
    )
    overlap_min_tokens: NotNegative = Field(
        default=_DEFAULTS.overlap_min_tokens,
        description="ep_level 2: batches below this many tokens are not cut.",
    )
    dispatch_dtype: Literal["full", "int8", "fp8"] = Field(
        default="full",
        description="Type in which rows travel to their experts: their own (full), or 8 bits with scales. "
        "Results travel back in full.",
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=_DEFAULTS.timeout_s,
        description="Seconds a collective may take, and a step of the engine between two MoE layers. "
        "Then it fails, naming the rank that is lost.",
    )
    placement: PlacementSettings = Field(
        default_factory=PlacementSettings,
        description="Which rank holds which experts, and which replica a token takes.",
    )
    balance: BalanceSettings = Field(
        default_factory=BalanceSettings, description="Whether and how experts move while serving."
    )
    engine: EngineSettings = Field(
        default_factory=EngineSettings, description="Settings of LMDeploy's PyTorch engine."
    )

    def level(self, phase: Phase) -> int:
        """The `ep_level` of a phase."""
        return of_phase(self.ep_level, phase)

    def max_tokens(self, phase: Phase) -> int | None:
        """The most tokens that a rank holds in one call of a phase; None where nothing bounds them."""
        return self.engine.max_batch_size if phase == "decode" else None

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        return _check_name(name, DEVICES, AUTO)

    @field_validator("alltoall_ep_buffer_scale_factors")
    @classmethod
    def _descending(cls, factors: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        for (length, _), (following, _) in pairwise(factors):
            if following >= length:
                raise ValueError(f"lengths must be strictly descending, but {following} follows {length}")
        return factors
