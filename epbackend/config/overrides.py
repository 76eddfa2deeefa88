"""Settings from the command line or a program, over those of a file: `--ep-size 4`, `--set engine.dtype=float32`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from epbackend.config.files import load_json, load_yaml
from epbackend.errors import ConfigError


@dataclass(frozen=True)
class Override:
    """One setting: its dotted name, its value, and where it was given, for the error that names it."""

    setting: str
    value: Any
    origin: str


def assignment(text: str) -> Override:
    """What `--set` was given; the value is read as YAML.

    >>> assignment("engine.dtype=float32").value, assignment("ep_level={prefill: 2, decode: 1}").value
    ('float32', {'prefill': 2, 'decode': 1})

    Raises:
        ConfigError: it is no `setting=value`, or the value is no YAML.
    """
    setting, equals, value = text.partition("=")
    if not equals or not setting.strip():
        raise ConfigError(f"--set {text}: write setting=value, for example engine.dtype=float32")
    return Override(setting.strip(), read_value(value, f"--set {setting}"), f"--set {setting.strip()}")


def read_value(text: str, origin: str) -> Any:
    """A value as in a JSON or YAML file: 2, 1e6, true, a word, or {prefill: 2, decode: 1}.

    Raises:
        ConfigError: it is neither.
    """
    try:
        with suppress(ValueError):  # YAML would read 1e6 as a word
            return load_json(text)
        return load_yaml(text)
    except RecursionError:
        raise ConfigError(f"{origin}: the value is nested too deeply") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{origin}={text[:80]}: the value is not YAML: {problem}") from None


def with_overrides(settings: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """The settings with those of the overrides in place, the last of a name; what was given is left as it is."""
    result = dict(settings)
    for each in overrides:
        *sections, name = each.setting.split(".")
        place = result
        for section in sections:
            inner = place.get(section)
            place[section] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[section]
        place[name] = each.value
    return result
