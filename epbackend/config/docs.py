"""Every setting described, from the fields themselves: for `config show`, `config schema`, docs/configuration.md."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from epbackend.config.ep_config import OLD_NAMES, EPConfig
from epbackend.config.schema import BalanceSettings, EngineSettings, PlacementSettings, Section

SECTIONS: dict[str, type[Section]] = {
    "placement": PlacementSettings,
    "balance": BalanceSettings,
    "engine": EngineSettings,
}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted name, what it accepts (in words), its default, and what it does."""

    name: str
    accepts: str
    default: Any
    description: str


def settings() -> list[Setting]:
    """Every setting, those of a section under its name, such as `engine.tp`."""
    schema = EPConfig.model_json_schema()
    defaults = EPConfig().model_dump(mode="json")
    found = [*_section(schema["properties"], defaults, prefix="")]
    for name, section in SECTIONS.items():
        properties = schema["$defs"][section.__name__]["properties"]
        found += _section(properties, defaults[name], prefix=f"{name}.")
    return found


def values(config: EPConfig) -> dict[str, Any]:
    """The value of every setting by its dotted name."""
    top = config.model_dump(mode="json")
    sections = {section: top.pop(section) for section in SECTIONS}
    return top | {
        f"{section}.{name}": value for section in SECTIONS for name, value in sections[section].items()
    }


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration file, for editors."""
    schema = EPConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties = schema["properties"]
    properties["moe_ep"] = {
        **properties["ep_size"],
        "title": "MoE EP",
        "description": "MindIE's name for ep_size.",
    }
    for old, name in OLD_NAMES.items():
        properties[old] = {
            **properties[name],
            "deprecated": True,
            "description": f"The old name of {name}.",
        }
    return schema


def markdown() -> str:
    """The table of docs/configuration.md."""
    rows = [
        f"| `{setting.name}` | {setting.accepts} | {_shown(setting.default)} | {setting.description} |"
        for setting in settings()
    ]
    return "\n".join(["| setting | accepts | default | meaning |", "|---|---|---|---|", *rows])


def _section(properties: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
    for name, schema in properties.items():
        if name not in SECTIONS:
            yield Setting(prefix + name, _accepts(schema), defaults[name], schema["description"])


def _accepts(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words, such as `integer >= 1` or `number in (0, 1]`."""
    if "examples" in schema:
        return ", ".join(map(str, schema["examples"]))
    for choices in ("anyOf", "oneOf"):
        if choices in schema:
            return " or ".join(_accepts(choice) for choice in schema[choices] if choice.get("type") != "null")
    if "$ref" in schema:
        return "one for each phase"
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema["type"] in ("integer", "number"):
        return schema["type"] + _range(schema)
    if schema["type"] == "array":
        if "prefixItems" not in schema["items"]:
            return f"list of {_accepts(schema['items'])}s"
        return f"list of [{', '.join(_accepts(item) for item in schema['items']['prefixItems'])}]"
    return {"boolean": "true, false", "object": "a mapping", "string": "text"}[schema["type"]]


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if high is None and below is None:
        return f" >= {low}" if above is None else f" > {above}"
    start = f"[{low}" if above is None else f"({above}"
    end = f"{high}]" if below is None else f"{below})"
    return f" in {start}, {end}"


def _shown(value: Any) -> str:
    return "unset" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"
