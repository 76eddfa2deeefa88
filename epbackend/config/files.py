"""Reads a YAML or JSON file whose top level is a mapping."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from epbackend.errors import ConfigError


def read_mapping(path: str | PathLike[str]) -> dict[str, Any]:
    """The mapping a file holds: JSON where its name ends in .json, otherwise YAML.

    Raises:
        ConfigError: no such file, not UTF-8, a syntax error (with its line), a key given twice, no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    parse = _parse_json if path.suffix.lower() == ".json" else _parse_yaml
    try:
        content = parse(text, path)
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be a configuration") from None
    if content is None:
        raise ConfigError(f"{path}: is empty: write at least one setting, for example `ep_size: 2`")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must hold `name: value` settings at its top level, but holds a {type(content).__name__}"
        )
    return content


def load_json(text: str) -> Any:
    """A value as JSON files have it: a key is given once. Raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_unique_pairs)


def load_yaml(text: str) -> Any:
    """A value as YAML files have it: likewise, and `on:` is a name. Raises yaml.YAMLError or RecursionError."""
    return yaml.load(text, Loader=_Loader)


def _parse_json(text: str, path: Path) -> Any:
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except _DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:  # of a whole number with thousands of digits
        raise ConfigError(f"{path}: a number cannot be read: {_first_clause(error)}") from None


class _DuplicateKeyError(ValueError):
    pass


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f"{twice!r} is given twice in the same object: keep one")
    return mapping


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        return load_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses two equal keys, of which PyYAML keeps the last without a word. Its errors have a place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if type(value) is int:
                str(value)  # raises for one that no message could show, which hexadecimal digits may write
            return value
        except (ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # PyYAML takes what looks like a date or a number for one: 2024-13-45, 0x_, !!int "".
            problem = (
                f"{str(node.value)[:40]!r} cannot be read ({_first_clause(error)}): quote it, if it is text"
            )
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value!r} is given twice in the same mapping: keep one"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _first_clause(error: Exception) -> str:
    """What is wrong, without the remedy of those who write programs."""
    return str(error).partition(";")[0]
