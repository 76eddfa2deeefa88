"""Errors meant for people: each message names what is wrong and what to do about it. Checks of names and numbers.

The command line prints errors without a traceback and exits with their code.
"""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

ENGINE_FAILED = 70
"""Exit code of a server whose engine failed while it served (EX_SOFTWARE of sysexits.h); supervisors restart it."""


class EPError(Exception):
    """Base of every error that epbackend raises on purpose."""

    exit_code = 2
    """Of the command that ends by it."""


class ConfigError(EPError):
    """A setting, or a combination of settings, that cannot work."""


class UnavailableError(EPError):
    """A device, package, model or version that is needed and not there."""


class CollectiveError(EPError):
    """A collective that failed or timed out; names it and the ranks that did not answer."""


class WorkerError(EPError):
    """A process of the engine that ended unexpectedly; names its rank."""


class EngineFailedError(WorkerError):
    """A server's engine that failed while it served."""

    exit_code = ENGINE_FAILED


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the closest known name, or an empty text.

    >>> did_you_mean("alltoal", ["allgather", "alltoall"])
    ", did you mean 'alltoall'?"
    """
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def unknown_name(what: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of the known ones.

    >>> str(unknown_name("split:", "evn", ["even", "level"]))
    "split: 'evn' is unknown, did you mean 'even'?; known are even, level"
    """
    names = list(known)
    hint = did_you_mean(str(name), names)
    return ConfigError(f"{what} {name!r} is unknown{hint}; known are {', '.join(names)}")


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int. Raises ConfigError, with the name, for what is no whole number, or is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name}: must be a whole number of {least} or more, not {value!r}")
    return int(value)


def real_number(name: str, value: Any, below: float = math.inf) -> float:
    """`value` as a float. Raises ConfigError, with the name, for what is no number of 0 or more and below `below`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < below:  # type: ignore[operator]
        above = f"from 0 to below {below:g}" if below < math.inf else "of 0 or more, and finite"
        raise ConfigError(f"{name}: must be a number {above}, not {value!r}")
    return float(value)
