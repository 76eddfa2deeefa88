"""Which dispatcher serves a layer: chosen once, with the reasons of those passed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from epbackend.dispatch.base import Dispatcher, LayerSpec
from epbackend.dispatch.local_experts import row_bound
from epbackend.dispatch.row_format import DISPATCH_DTYPES
from epbackend.dispatch.token_groups import Sliced
from epbackend.errors import ConfigError, UnavailableError, unknown_name
from epbackend.names import AUTO, DISPATCHERS

logger = logging.getLogger("epbackend")


@dataclass(frozen=True)
class Decision:
    """The dispatcher taken, why, and why not the others."""

    name: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]
    """(name, reason) of every other dispatcher."""


@dataclass(frozen=True)
class DispatcherInfo:
    """A dispatcher as `epbackend doctor` shows it."""

    name: str
    level: int | None
    """None where its package does not load."""
    summary: str
    unavailable: str | None
    """Why it cannot be used on this machine; None if it can."""


@cache
def _classes() -> tuple[dict[str, type[Dispatcher]], dict[str, str]]:
    """The dispatchers' classes by name, the preferred one first; and why those of other packages do not load."""
    classes, broken = {}, {}
    for name in DISPATCHERS.names():
        try:
            classes[name] = DISPATCHERS.load(name)
        except UnavailableError as error:
            broken[name] = str(error)
    return classes, broken


def dispatchers() -> tuple[DispatcherInfo, ...]:
    """Every dispatcher, usable on this machine or not."""
    classes, broken = _classes()
    usable = [DispatcherInfo(name, cls.level, cls.summary, cls.missing()) for name, cls in classes.items()]
    return (*usable, *(DispatcherInfo(name, None, "", reason) for name, reason in broken.items()))


def choose(spec: LayerSpec) -> tuple[Dispatcher, Decision]:
    """The dispatcher for a layer, ready to begin, and the reasons. All ranks of the spec's group call it together.

    Raises:
        ConfigError: the pinned dispatcher cannot serve, or a setting cannot work for this layer.
    """
    choice = decide(spec, _agreed(spec))
    _log(choice, spec.settings.level)
    cls = _classes()[0][choice.name]
    dispatcher = cls(spec)
    shared_tokens = spec.ranks.token_size > 1 and not cls.needs_all_tokens
    return Sliced(dispatcher) if shared_tokens else dispatcher, choice


def decide(spec: LayerSpec, agreed: Mapping[str, str | None] = MappingProxyType({})) -> Decision:
    """What `choose` takes, without making it and without a collective; raises as it does.

    `agreed` has what running ranks found out together (`Dispatcher.agree`), by the dispatcher's name. `spec.ranks` may
    be without a group: then only this machine is judged.
    """
    row_bound(0, spec.top_k, spec.settings)  # a factor too small for top_k is an error now, not later
    if spec.settings.dispatch_dtype not in DISPATCH_DTYPES:
        known = ", ".join(DISPATCH_DTYPES)
        raise ConfigError(f"dispatch_dtype {spec.settings.dispatch_dtype!r} is unknown; it is one of {known}")
    classes, broken = _classes()
    reasons = {name: cls.unsupported(spec) or agreed.get(name) for name, cls in classes.items()} | broken
    named = spec.settings.dispatcher
    if unknown := [name for name in named if name not in reasons]:
        raise unknown_name("dispatcher", unknown[0], (AUTO, *reasons))
    name = _first_usable(spec, named or tuple(reasons), reasons)
    why = classes[name].reason(spec)
    other = f"usable, but {name} is {'pinned' if named else 'preferred'}"
    passed_over = tuple((rival, reason or other) for rival, reason in reasons.items() if rival != name)
    return Decision(name, f"pinned; {why}" if named else why, passed_over)


def _agreed(spec: LayerSpec) -> dict[str, str | None]:
    """What the ranks find out together about each dispatcher that could serve, by its name: the reason against it."""
    if spec.ranks.group is None:
        return {}
    return {name: cls.agree(spec) for name, cls in _classes()[0].items() if cls.unsupported(spec) is None}


def _first_usable(spec: LayerSpec, candidates: tuple[str, ...], reasons: dict[str, str | None]) -> str:
    usable = [name for name in candidates if reasons[name] is None]
    if usable:
        return usable[0]
    if not spec.settings.dispatcher:
        raise ConfigError(f"no dispatcher serves ep_level {spec.settings.level}: {_listed(reasons)}")
    if len(candidates) == 1:
        pinned = candidates[0]
        raise ConfigError(
            f"dispatcher {pinned} is pinned but cannot be used: {reasons[pinned]}; take another, or auto"
        )
    why = _listed({name: reasons[name] for name in candidates})
    raise ConfigError(
        f"none of the dispatchers that are named can be used: {why}; name another, or write auto"
    )


@cache
def _log(choice: Decision, level: int) -> None:
    """Log a choice once, not for each layer."""
    others = "; ".join(f"not {name}: {reason}" for name, reason in choice.passed_over)
    logger.info("ep_level %d: dispatcher %s (%s); %s", level, choice.name, choice.reason, others)


def _listed(reasons: dict[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
