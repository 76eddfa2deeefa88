"""EPConfig: every setting of a deployment."""

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points
from itertools import pairwise
from os import PathLike
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from epbackend.config import dispatchers, mindie, parallel, rules
from epbackend.config.base import ConfigWarning, Section
from epbackend.config.dispatchers import NamesOrPhases, PhaseDispatchers
from epbackend.config.engine import EngineSettings, Positive
from epbackend.config.files import read_mapping
from epbackend.config.placement import PhaseSplits, PlacementSettings
from epbackend.config.problems import UNION_TAGS, Problem, config_error, from_pydantic
from epbackend.config.rules import LEVEL_OF_DISPATCHER
from epbackend.dispatch.base import DispatchSettings
from epbackend.errors import did_you_mean

Phase = Literal["prefill", "decode"]
BUILT_IN_DEVICES = ("cpu", "cuda", "ascend")
_DEFAULTS = DispatchSettings()


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


_LEVEL, _PHASES = UNION_TAGS
LevelOrPhases = Annotated[
    Annotated[Level, Tag(_LEVEL)] | Annotated[PhaseLevels, Tag(_PHASES)],
    Discriminator(lambda value: _PHASES if isinstance(value, Mapping | PhaseLevels) else _LEVEL),
]


def _pairs(value: Any) -> Any:
    """Lists as tuples, which strict validation asks for."""
    if not isinstance(value, list | tuple) or not all(isinstance(pair, list | tuple) for pair in value):
        raise ValueError("must be a list of [length, scale] pairs, for example [[8192, 2.0], [0, 8.0]]")
    return tuple(tuple(pair) for pair in value)


BufferFactor = tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]]


class EPConfig(Section):
    """Everything a deployment sets.  Frozen; equal settings compare equal.

    Raises:
        ConfigError: naming every setting that is unknown, out of its range, or contradicts another one.
    """

    device: str = Field(
        default="auto",
        examples=["auto", *BUILT_IN_DEVICES],
        description="Where experts run. A package adds names by entry points of the group epbackend.devices.",
    )
    kernels: Literal["auto", "triton", "grouped_mm", "reference"] = Field(
        default="auto",
        description="Who multiplies. auto: the device's own kernels, on cuda triton. grouped_mm is torch's "
        "product, for cuda. reference is plain torch: for checks, slow.",
    )
    check_expert_ids: bool = Field(
        default=True,
        description="Tell of a router that chooses experts that do not exist. Nothing waits for a GPU to do so.",
    )
    ep_size: Positive = Field(
        default=1,
        description="Expert-parallel ranks; the experts are divided among them. MindIE's name for it: "
        "moe_ep.",
    )
    ep_level: LevelOrPhases = Field(
        default=1,
        description="Rows travel by all-gather (1) or all-to-all (2). One for each phase: {prefill: 2, "
        "decode: 1}.",
    )
    dispatcher: NamesOrPhases = Field(
        default="auto",
        examples=["auto", *LEVEL_OF_DISPATCHER, "names in order of preference", "one for each phase"],
        description="How rows travel. auto takes the best that can serve the ep_level here, and says why. "
        "What is named is taken, or the next one named (symmetric, alltoall), or it is an error. "
        "mc2 serves decode only.",
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
    overlap_min_tokens: Annotated[int, Field(ge=0)] = Field(
        default=_DEFAULTS.overlap_min_tokens,
        description="ep_level 2: batches below this many tokens are not cut.",
    )
    transport: Literal["full", "int8", "fp8"] = Field(
        default="full",
        description="Form in which rows travel to their experts: as they are, or in 8 bits with scales. "
        "Results travel back in full.",
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=_DEFAULTS.timeout_s,
        description="Seconds a collective may take. Then it fails, naming the ranks that do not answer.",
    )
    placement: PlacementSettings = Field(
        default_factory=PlacementSettings,
        description="Which rank holds which experts, and which copy a token takes.",
    )
    engine: EngineSettings = Field(
        default_factory=EngineSettings, description="Settings of LMDeploy's PyTorch engine."
    )

    @classmethod
    def load(cls, source: str | PathLike[str] | Mapping[str, Any]) -> "EPConfig":
        """Reads a YAML or JSON file, a MindIE `config.json`, or a mapping of the same form.

        Warns (`ConfigWarning`) of settings without effect and of what a MindIE file holds and we ignore.

        Raises:
            ConfigError: the file is missing, unreadable or no mapping, or a setting in it cannot work.
        """
        content, name = (source, None) if isinstance(source, Mapping) else (read_mapping(source), str(source))
        if mindie.is_mindie(content):
            found = mindie.translate(content, name)
        else:
            found = mindie.Translation(settings=dict(content))
        config = cls.model_validate(found.settings, context={"source": name, "origins": found.origins})
        for text in [*found.notes, *config.warnings()]:
            warnings.warn(text, ConfigWarning, stacklevel=2)
        return config

    @classmethod
    def from_json(cls, text: str) -> "EPConfig":
        """The inverse of `to_json`."""
        return cls.model_validate(json.loads(text))

    def to_json(self) -> str:
        """Every setting, defaults included, in one line: how worker processes receive the configuration."""
        return self.model_dump_json()

    def level(self, phase: Phase) -> int:
        """The `ep_level` of a phase."""
        return getattr(self.ep_level, phase) if isinstance(self.ep_level, PhaseLevels) else self.ep_level

    def dispatcher_of(self, phase: Phase) -> str:
        """The dispatchers that may serve a phase, in order of preference, separated by commas; or auto."""
        return dispatchers.of_phase(self, phase)

    def dispatch_settings(self, phase: Phase) -> DispatchSettings:
        """What the data path of one phase needs to know."""
        return DispatchSettings(
            level=self.level(phase),
            dispatcher=self.dispatcher_of(phase),
            topk_scaling_factor=self.topk_scaling_factor,
            cutoff_min_tokens=self.init_routing_cutoff_min_tokens,
            buffer_scale_factors=self.alltoall_ep_buffer_scale_factors,
            overlap_chunks=self.overlap_chunks,
            overlap_min_tokens=self.overlap_min_tokens,
            max_tokens=self.engine.max_batch_size if phase == "decode" else None,
            static=phase == "decode" and self.captures_graphs,
            dispatch_dtype=self.transport,
            timeout_s=self.timeout_s,
        )

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are captured in CUDA graphs, for which LMDeploy pads all ranks' batches alike."""
        if self.engine.eager_mode:
            return False
        if self.device == "auto":
            from epbackend.device import get_device  # imports torch, which checking a config does not need

            return get_device().name == "cuda"
        return self.device == "cuda"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return parallel.world_size(self.ep_size, self.engine.tp)

    @property
    def attn_tp(self) -> int:
        """Ranks that share one attention group, and so hold the same tokens."""
        return self.world_size // self.engine.dp

    def warnings(self) -> list[str]:
        """The settings that have no effect, and why."""
        return rules.without_effect(self)

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        known = ["auto", *dict.fromkeys([*BUILT_IN_DEVICES, *entry_points(group="epbackend.devices").names])]
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
        return name

    @field_validator("alltoall_ep_buffer_scale_factors")
    @classmethod
    def _descending(cls, factors: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        for (length, _), (following, _) in pairwise(factors):
            if following >= length:
                raise ValueError(f"lengths must be strictly descending, but {following} follows {length}")
        return factors

    @model_validator(mode="wrap")
    @classmethod
    def _all_problems_at_once(
        cls, data: Any, validate: ModelWrapValidatorHandler["EPConfig"], info: ValidationInfo
    ) -> "EPConfig":
        """Turns pydantic's findings, or else contradictions between settings, into one ConfigError."""
        context = info.context or {}
        data, disagreement = _resolve_moe_ep(data)
        try:
            config = validate(data)
        except ValidationError as error:
            raise config_error([*disagreement, *from_pydantic(error, _SECTIONS)], **context) from None
        if problems := [*disagreement, *rules.contradictions(config), *dispatchers.problems(config)]:
            raise config_error(problems, **context)
        return config


def _resolve_moe_ep(data: Any) -> tuple[Any, list[Problem]]:
    """`moe_ep` renamed to `ep_size`; a problem where both are given and disagree."""
    if not isinstance(data, Mapping) or "moe_ep" not in data:
        return data, []
    renamed = {key: value for key, value in data.items() if key != "moe_ep"}
    ep_size = renamed.setdefault("ep_size", data["moe_ep"])
    if ep_size == data["moe_ep"]:
        return renamed, []
    return renamed, [
        Problem(
            "moe_ep", f"is another name of ep_size, which says {ep_size}: keep one of them", data["moe_ep"]
        )
    ]


_SECTIONS = {
    "": EPConfig.model_fields.keys(),
    "placement": PlacementSettings.model_fields.keys(),
    "engine": EngineSettings.model_fields.keys(),
    "ep_level": PhaseLevels.model_fields.keys(),
    "dispatcher": PhaseDispatchers.model_fields.keys(),
    "placement.split": PhaseSplits.model_fields.keys(),
}
