"""Where the experts live: a finished placement, or what to plan one on, and how tokens choose among replicas."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from epbackend.config.base import Section
from epbackend.config.problems import UNION_TAGS
from epbackend.errors import did_you_mean

SplitName = Literal["even", "nearest", "level"]
SPLIT_NAMES = get_args(SplitName)


def _split(value: Any) -> Any:
    if value not in SPLIT_NAMES:
        raise ValueError(
            f"must be {', '.join(SPLIT_NAMES[:-1])} or {SPLIT_NAMES[-1]}, "
            "or one of them for each phase: {prefill: level, decode: nearest}"
        )
    return value


Split = Annotated[SplitName, BeforeValidator(_split)]


class PhaseSplits(Section):
    """A `split` for each phase."""

    prefill: Split = Field(description="split while prompts are read (many tokens a step).")
    decode: Split = Field(description="split while answers are written (one token a request and step).")


_ONE, _PHASES = UNION_TAGS
SplitOrPhases = Annotated[
    Annotated[Split, Tag(_ONE)] | Annotated[PhaseSplits, Tag(_PHASES)],
    Discriminator(lambda value: _PHASES if isinstance(value, Mapping | PhaseSplits) else _ONE),
]


def _files(value: Any) -> Any:
    """One file, or a list of them, as the tuple that strict validation asks for."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be a list of file names")
    return tuple(value)


class PlacementSettings(Section):
    """The experts' homes; without `file` and `loads` every expert has one, in order."""

    file: str | None = Field(
        default=None,
        description="A placement, in any format that epbackend convert reads. Instead of loads.",
    )
    loads: Annotated[tuple[str, ...], BeforeValidator(_files)] = Field(
        default=(),
        description="Recorded loads (epbackend record) to plan a placement on, once, before the ranks start.",
    )
    algorithm: str | None = Field(
        default=None,
        examples=["refined", "omni", "eplb", "lplb"],
        description="Who plans. Unset: refined. A package adds names by entry points of the group "
        "epbackend.planners.",
    )
    redundant_experts: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Slots of each layer beyond one an expert. ep_size must divide the slots.",
    )
    budget: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Redundant slots of all layers together, given to layers by need. Instead of redundant_experts.",
    )
    objective: str = Field(
        default="tokens",
        description="What planning balances: tokens, activated, or a JSON file with measured times.",
    )
    search_ms: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Milliseconds that planning may search on for in each layer.",
    )
    node_size: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Ranks of a node, which split prefers to others. It must divide ep_size. 0: those of the "
        "file, or all.",
    )
    split: SplitOrPhases = Field(
        default="even",
        description="Which copy a token takes: each in turn (even), the nearest, or the one that levels the ranks' "
        "load (level; one small collective a layer). One for each phase: {prefill: level, decode: nearest}. "
        "Where it is level in both, refined plans for that.",
    )

    @property
    def given(self) -> bool:
        """Whether there is anything to place by."""
        return self.file is not None or bool(self.loads)

    def split_of(self, phase: str) -> str:
        """The split of a phase."""
        return getattr(self.split, phase) if isinstance(self.split, PhaseSplits) else self.split

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, name: str | None) -> str | None:
        # Imported late: most configurations plan nothing.
        from epbackend.placement.planners import planner_names

        if name is not None and name not in (known := planner_names()):
            raise ValueError(f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
        return name
