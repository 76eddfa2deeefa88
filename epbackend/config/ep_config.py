"""EPConfig: every setting of a deployment, read, checked, and handed to the data path phase by phase."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from pydantic import ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator

from epbackend.config import checks, mindie
from epbackend.config.files import read_mapping
from epbackend.config.issues import ConfigIssue, ConfigWarning, config_error, from_pydantic
from epbackend.config.overrides import Override, with_overrides
from epbackend.config.schema import (
    BalanceSettings,
    EngineSettings,
    PhaseDispatchers,
    PhaseLevels,
    PhaseSplits,
    PlacementSettings,
    Settings,
)
from epbackend.dispatch.settings import DispatchSettings
from epbackend.errors import ConfigError
from epbackend.names import AUTO, Phase

OLD_NAMES = {"transport": "dispatch_dtype"}
"""Settings that were renamed: the old name works on, with a warning."""
OTHER_NAMES = {"moe_ep": "ep_size", **OLD_NAMES}


class EPConfig(Settings):
    """Everything a deployment sets.  Frozen; equal settings compare equal.

    Raises:
        ConfigError: names every setting that is unknown, out of its range, or contradicts another one.
    """

    @classmethod
    def load(
        cls, source: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[Override] = ()
    ) -> EPConfig:
        """Reads a YAML or JSON file, a MindIE `config.json`, or a mapping of the same form; `overrides` go over it.

        Warns (`ConfigWarning`) of settings without effect, of old names, and of keys of a MindIE file that are ignored.

        Raises:
            ConfigError: the file is missing, unreadable or no mapping, or a setting in it cannot work.
        """
        content, name = (source, None) if isinstance(source, Mapping) else (read_mapping(source), str(source))
        if mindie.is_mindie(content):
            found = mindie.translate(content, name)
        else:
            found = mindie.Translation(settings=dict(content))
        overrides = [replace(each, setting=_present_name(each.setting)) for each in overrides]
        if overrides:
            present, disagreements = _with_present_names(found.settings)
            if disagreements:
                raise config_error(disagreements, name, found.origins)
            found.settings = with_overrides(present, overrides)
            found.origins |= {each.setting: each.origin for each in overrides}
        config = cls.model_validate(found.settings, context={"source": name, "origins": found.origins})
        for text in [*found.notes, *config.warnings()]:
            warnings.warn(text, ConfigWarning, stacklevel=2)
        return config

    @classmethod
    def require(cls, config: object) -> None:
        """For calls that take a config: raises ConfigError for a mapping or a path, which `load` would read."""
        if not isinstance(config, cls):
            raise ConfigError(
                f"config: must be an EPConfig, not {type(config).__name__}: EPConfig.load reads a mapping or a file"
            )

    @classmethod
    def from_json(cls, text: str) -> EPConfig:
        """The inverse of `to_json`."""
        return cls.model_validate(json.loads(text))

    def to_json(self) -> str:
        """Every setting, defaults included, in one line: how worker processes receive the configuration."""
        return self.model_dump_json()

    def dispatcher_of(self, phase: Phase) -> tuple[str, ...]:
        """The dispatchers that may serve a phase, in order of preference; empty: the best that can (auto)."""
        return checks.dispatchers_of(self, phase)

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
            max_tokens=self.max_tokens(phase),
            static=phase == "decode" and self.captures_graphs,
            dispatch_dtype=self.dispatch_dtype,
            timeout_s=self.timeout_s,
        )

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are captured in CUDA graphs, for which LMDeploy pads all ranks' batches alike."""
        if self.engine.eager_mode:
            return False
        if self.device == AUTO:
            from epbackend.device import get_device  # imports torch, which checking a config does not need

            return get_device().name == "cuda"
        return self.device == "cuda"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return checks.world_size(self.ep_size, self.engine.tp)

    @property
    def attn_tp(self) -> int:
        """Ranks that share one attention group, and so hold the same tokens."""
        return self.world_size // self.engine.dp

    def warnings(self) -> list[str]:
        """The settings that have no effect, and why."""
        return checks.without_effect(self)

    @model_validator(mode="wrap")
    @classmethod
    def _all_issues_at_once(
        cls, data: Any, validate: ModelWrapValidatorHandler[EPConfig], info: ValidationInfo
    ) -> EPConfig:
        """Turns pydantic's errors, or else contradictions between settings, into one ConfigError."""
        context = info.context or {}
        data, disagreements = _with_present_names(data)
        try:
            config = validate(data)
        except ValidationError as error:
            raise config_error([*disagreements, *from_pydantic(error, _SECTIONS)], **context) from None
        if issues := [*disagreements, *checks.contradictions(config)]:
            raise config_error(issues, **context)
        return config


def _with_present_names(data: Any) -> tuple[Any, list[ConfigIssue]]:
    """`moe_ep` and old names as what they are called here; an issue where both names are given and disagree."""
    if not isinstance(data, Mapping):
        return data, []
    renamed, issues = dict(data), []
    for other, name in OTHER_NAMES.items():
        if other not in renamed:
            continue
        value = renamed.pop(other)
        if renamed.setdefault(name, value) != value:
            reason = f"is another name of {name}, which says {renamed[name]}: keep one of them"
            issues.append(ConfigIssue(other, reason, value))
        elif other in OLD_NAMES:
            warnings.warn(f"{other} is now called {name}: rename it", ConfigWarning, stacklevel=4)
    return renamed, issues


def _present_name(setting: str) -> str:
    """The name of a setting, which may be given by another one."""
    return OTHER_NAMES.get(setting, setting)


_SECTIONS = {
    "": EPConfig.model_fields.keys(),
    "placement": PlacementSettings.model_fields.keys(),
    "balance": BalanceSettings.model_fields.keys(),
    "engine": EngineSettings.model_fields.keys(),
    "ep_level": PhaseLevels.model_fields.keys(),
    "dispatcher": PhaseDispatchers.model_fields.keys(),
    "placement.split": PhaseSplits.model_fields.keys(),
}
