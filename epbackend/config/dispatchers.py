"""Which dispatchers may serve a phase, in order of preference: `auto`, or those that the config names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from epbackend.config.base import Section
from epbackend.config.problems import UNION_TAGS, Problem
from epbackend.config.rules import DECODE_ONLY, LEVEL_OF_DISPATCHER
from epbackend.errors import did_you_mean

if TYPE_CHECKING:
    from epbackend.config.settings import EPConfig, Phase

PHASES: "tuple[Phase, ...]" = ("prefill", "decode")


def names(value: str) -> list[str]:
    """'symmetric, alltoall' -> ['symmetric', 'alltoall']"""
    return [name.strip() for name in value.split(",")]


def _known(value: Any) -> Any:
    """One name, names separated by commas, or a list of them; a list becomes such a string."""
    found = names(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError("must be a dispatcher's name, or names in order of preference")
    known = ["auto", *LEVEL_OF_DISPATCHER]
    for name in found:
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
    if len(found) > 1 and ("auto" in found or len(set(found)) < len(found)):
        raise ValueError("must name each dispatcher once, and auto alone")
    return ", ".join(found)


Names = Annotated[str, BeforeValidator(_known)]


class PhaseDispatchers(Section):
    """A `dispatcher` for each phase."""

    prefill: Names = Field(description="dispatcher while prompts are read (many tokens a step).")
    decode: Names = Field(description="dispatcher while answers are written (one token a request and step).")


_ONE, _PHASES = UNION_TAGS
NamesOrPhases = Annotated[
    Annotated[Names, Tag(_ONE)] | Annotated[PhaseDispatchers, Tag(_PHASES)],
    Discriminator(lambda value: _PHASES if isinstance(value, Mapping | PhaseDispatchers) else _ONE),
]


def of_phase(config: "EPConfig", phase: "Phase") -> str:
    """The named ones that can serve the phase, or auto: also where one that only serves decode is named for both."""
    if isinstance(config.dispatcher, PhaseDispatchers):
        return getattr(config.dispatcher, phase)
    fit = [name for name in names(config.dispatcher) if _unfit(name, phase, config) is None]
    return ", ".join(fit) or "auto"


def problems(config: "EPConfig") -> list[Problem]:
    """What the named ones cannot serve."""
    given = config.dispatcher
    if isinstance(given, PhaseDispatchers):
        each = [(phase, name) for phase in PHASES for name in names(getattr(given, phase))]
        reasons = [(f"dispatcher.{phase}", name, _unfit(name, phase, config)) for phase, name in each]
    else:
        reasons = [("dispatcher", given, _shared_trouble(names(given), config))]
    remedy = "write auto, or change one of them"
    return [Problem(field, f"{reason}: {remedy}", value) for field, value, reason in reasons if reason]


def _shared_trouble(found: list[str], config: "EPConfig") -> str | None:
    """Why one list does not do for both phases: a name that serves neither, or a phase that no name serves."""
    reasons = {name: {phase: _unfit(name, phase, config) for phase in PHASES} for name in found}
    for name, of_phase in reasons.items():
        if all(of_phase.values()):
            return of_phase["decode" if name in DECODE_ONLY else "prefill"]
    for phase in PHASES:
        by_itself = phase == "prefill" and set(found) <= set(DECODE_ONLY)
        if all(of_phase[phase] for of_phase in reasons.values()) and not by_itself:
            return reasons[found[0]][phase]
    return None


def _unfit(name: str, phase: "Phase", config: "EPConfig") -> str | None:
    if name == "auto":
        return None
    if name in DECODE_ONLY and phase == "prefill":
        return "serves decode only"
    if config.level(phase) != LEVEL_OF_DISPATCHER[name]:
        return (
            f"serves ep_level {LEVEL_OF_DISPATCHER[name]}, but ep_level of {phase} is {config.level(phase)}"
        )
    if name in DECODE_ONLY and config.engine.max_batch_size is None:
        return "is sized by engine.max_batch_size, which is not set"
    if name == "replicated" and config.engine.dp > 1:
        return f"needs all tokens on every rank, but engine.dp is {config.engine.dp}"
    return None
