"""Problems of a configuration, in words: what is wrong, with which value, and what to write instead."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from epbackend.errors import ConfigError, did_you_mean

Path = tuple[str | int, ...]
NO_VALUE = object()
# Pydantic puts the form of ep_level that it chose into the path of its findings.
UNION_TAGS = ("<level>", "<phases>")
_short = Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the dotted name of the setting, why, and the value given (if one was)."""

    field: str
    message: str
    value: Any = NO_VALUE


def config_error(
    problems: Iterable[Problem], source: str | None = None, origins: Mapping[str, str] | None = None
) -> ConfigError:
    """All problems as one error, a line each.

    source: the file they come from.  origins: setting -> what the file calls it, where the names differ.
    """
    lines = [_line(problem, (origins or {}).get(problem.field)) for problem in problems]
    head = f"{source or 'configuration'}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return ConfigError("\n  ".join([head, *lines]))


def _line(problem: Problem, origin: str | None) -> str:
    renamed = origin is not None and not origin.endswith(problem.field)
    name = f"{problem.field} (from {origin})" if renamed else problem.field
    given = "" if problem.value is NO_VALUE else f" (got {_short.repr(problem.value)})"
    return f"{name}: {problem.message}{given}"


def from_pydantic(error: ValidationError, sections: Mapping[str, Iterable[str]]) -> list[Problem]:
    """Pydantic's findings as problems.

    sections: the known keys of each section by its dotted name ("" is the top level), for the did-you-mean.
    """
    return [_problem(details["loc"], details, sections) for details in error.errors()]


def _problem(loc: Path, details: Mapping[str, Any], sections: Mapping[str, Iterable[str]]) -> Problem:
    field = dotted(loc)
    if details["type"] == "extra_forbidden":
        return Problem(field, "unknown setting" + _closest_setting(loc, sections))
    if details["type"] == "missing":
        return Problem(field, "is missing")
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(field, message, details["input"])


def dotted(loc: Path) -> str:
    """`("a", 0, "b")` as `a[0].b`."""
    parts = (part for part in loc if part not in ("", *UNION_TAGS))
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _closest_setting(loc: Path, sections: Mapping[str, Iterable[str]]) -> str:
    """The same name in another section, else the closest one in this section, else the closest anywhere."""
    section, name = dotted(loc[:-1]), str(loc[-1])
    everywhere = {key: dotted((where, key)) for where, keys in sections.items() for key in keys}
    if name not in everywhere and (here := did_you_mean(name, sections.get(section, ()))):
        return here
    close = get_close_matches(name, everywhere, n=1, cutoff=0.6)
    return f", did you mean {everywhere[close[0]]!r}?" if close else ""
