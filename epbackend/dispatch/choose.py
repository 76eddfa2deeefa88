"""Which dispatcher serves a layer: chosen once, with the reasons of those passed over."""

from __future__ import annotations

from dataclasses import dataclass

from epbackend.dispatch.allgather import AllGather
from epbackend.dispatch.alltoall import AllToAll
from epbackend.dispatch.base import Dispatcher, Problem
from epbackend.dispatch.replicated import Replicated
from epbackend.dispatch.sliced import Sliced
from epbackend.errors import ConfigError

DISPATCHERS: tuple[type[Dispatcher], ...] = (Replicated, AllGather, AllToAll)  # the best first


@dataclass(frozen=True)
class Choice:
    """The dispatcher taken, why, and why not the others."""

    name: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]


def dispatchers() -> tuple[type[Dispatcher], ...]:
    return DISPATCHERS


def choose(problem: Problem) -> tuple[Dispatcher, Choice]:
    pinned = problem.settings.dispatcher
    reasons = {cls.name: cls.unsupported(problem) for cls in DISPATCHERS}
    if pinned != "auto" and reasons.get(pinned, "there is no such dispatcher"):
        raise ConfigError(f"dispatcher {pinned} cannot be used: {reasons.get(pinned)}")
    name = pinned if pinned != "auto" else next(n for n, r in reasons.items() if r is None)
    cls = next(c for c in DISPATCHERS if c.name == name)
    dispatcher = cls(problem)
    if problem.ranks.token_size > 1 and cls is not Replicated:
        dispatcher = Sliced(dispatcher)
    return dispatcher, Choice(name, cls.summary, tuple((n, r or "") for n, r in reasons.items() if n != name))
