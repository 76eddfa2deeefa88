"""What is wrong with a configuration, in words: the setting, the value given, and what to write instead."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from epbackend.errors import ConfigError, did_you_mean

Path = tuple[str | int, ...]
NO_VALUE = object()
UNION_TAGS = ("<one>", "<each>")
"""Of settings with one value, or one for each phase: pydantic puts the form it chose into the path of its errors."""
_short = Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True)
class ConfigIssue:
    """One thing that is wrong: the dotted name of the setting, why, and the value given (if one was)."""

    field: str
    message: str
    value: Any = NO_VALUE


class ConfigWarning(UserWarning):
    """A valid setting without effect, an old name of a setting, or a key of a MindIE file that is not used."""


def config_error(
    issues: Iterable[ConfigIssue],
    source: str | None = None,
    origins: Mapping[str, str] | None = None,
) -> ConfigError:
    """All issues as one error, a line each.

    source: the file they come from.  origins: setting -> what the file calls it, where the names differ.
    """
    lines = [_line(issue, (origins or {}).get(issue.field)) for issue in issues]
    head = f"{source or 'configuration'}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return ConfigError("\n  ".join([head, *lines]))


def _line(issue: ConfigIssue, origin: str | None) -> str:
    renamed = origin is not None and not origin.endswith(issue.field)
    name = f"{issue.field} (from {origin})" if renamed else issue.field
    given = "" if issue.value is NO_VALUE else f" (got {_short.repr(issue.value)})"
    return f"{name}: {issue.message}{given}"


def from_pydantic(error: ValidationError, sections: Mapping[str, Iterable[str]]) -> list[ConfigIssue]:
    """Pydantic's errors as issues.

    sections: the known keys of each section by its dotted name ("" is the top level), for the did-you-mean.
    """
    return [_issue(details["loc"], details, sections) for details in error.errors()]


def _issue(loc: Path, details: Mapping[str, Any], sections: Mapping[str, Iterable[str]]) -> ConfigIssue:
    field = dotted(loc)
    if details["type"] == "extra_forbidden":
        return ConfigIssue(field, "unknown setting" + _closest_setting(loc, sections))
    if details["type"] == "missing":
        return ConfigIssue(field, "is missing")
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return ConfigIssue(field, message, details["input"])


def dotted(loc: Path) -> str:
    """The path to a setting as people write it.

    >>> dotted(("a", 0, "b"))
    'a[0].b'
    """
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
