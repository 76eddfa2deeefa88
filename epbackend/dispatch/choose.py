"""Which dispatcher serves a layer: chosen once, with the reasons of those passed over."""

from __future__ import annotations

from dataclasses import dataclass

from epbackend.dispatch.allgather import AllGather
from epbackend.dispatch.alltoall import AllToAll
from epbackend.dispatch.base import Dispatcher, Problem
from epbackend.dispatch.deepep import DeepEp
from epbackend.dispatch.mc2 import Mc2
from epbackend.dispatch.passes import row_bound
from epbackend.dispatch.replicated import Replicated
from epbackend.dispatch.sliced import Sliced
from epbackend.dispatch.symmetric import Symmetric
from epbackend.dispatch.transport import TRANSPORTS
from epbackend.errors import ConfigError

DISPATCHERS: tuple[type[Dispatcher], ...] = (Replicated, AllGather, Mc2, Symmetric, AllToAll, DeepEp)
"""The one that is preferred where several can serve comes first."""


@dataclass(frozen=True)
class Choice:
    """The dispatcher taken, why, and why not the others."""

    name: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]
    """(name, reason) of every other dispatcher."""


@dataclass(frozen=True)
class Listed:
    """A dispatcher as `epbackend doctor` shows it."""

    name: str
    level: int
    summary: str
    unavailable: str | None
    """Why it cannot be used on this machine; None if it can."""


def dispatchers() -> tuple[Listed, ...]:
    """Every dispatcher, usable on this machine or not."""
    return tuple(Listed(cls.name, cls.level, cls.summary, cls.missing()) for cls in DISPATCHERS)


def choose(problem: Problem) -> tuple[Dispatcher, Choice]:
    """The dispatcher for a layer, ready to begin, and the reasons.

    Raises ConfigError if the pinned dispatcher cannot serve, or if a setting cannot work for this layer.
    """
    row_bound(0, problem.top_k, problem.settings)  # a factor too small for top_k is an error now, not later
    if problem.settings.transport not in TRANSPORTS:
        known = ", ".join(TRANSPORTS)
        raise ConfigError(f"transport {problem.settings.transport!r} is unknown; it is one of {known}")
    pinned = problem.settings.dispatcher
    reasons = {cls.name: cls.unsupported(problem) for cls in DISPATCHERS}
    if pinned == "auto":
        name = _first_usable(problem, reasons)
        prefix, other = "", f"usable, but {name} is preferred"
    else:
        name = _pinned(pinned, reasons)
        prefix, other = "pinned; ", f"usable, but {name} is pinned"
    cls = next(cls for cls in DISPATCHERS if cls.name == name)
    passed_over = tuple((rival, reason or other) for rival, reason in reasons.items() if rival != name)
    return _build(cls, problem), Choice(name, prefix + cls.summary, passed_over)


def _first_usable(problem: Problem, reasons: dict[str, str | None]) -> str:
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        raise ConfigError(f"no dispatcher serves ep_level {problem.settings.level}: {_listed(reasons)}")
    return usable[0]


def _pinned(name: str, reasons: dict[str, str | None]) -> str:
    if name not in reasons:
        raise ConfigError(f"dispatcher {name!r} is unknown; known are auto, {', '.join(reasons)}")
    if reasons[name] is not None:
        raise ConfigError(
            f"dispatcher {name} is pinned but cannot be used: {reasons[name]}; take another, or auto"
        )
    return name


def _listed(reasons: dict[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _build(cls: type[Dispatcher], problem: Problem) -> Dispatcher:
    dispatcher = cls(problem)
    shared_tokens = problem.ranks.token_size > 1 and cls is not Replicated
    return Sliced(dispatcher) if shared_tokens else dispatcher
