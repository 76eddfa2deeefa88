"""The names that a configuration or a command may give: phases, devices, dispatchers, splits, planners.

This is the one table of them. It imports neither torch nor pydantic nor what it names: a class is given as
`module:attribute` and imported when it is used.

Devices, dispatchers and planners are plugins. A package adds one by an entry point in the group of its kind, under the
name that users write:

    [project.entry-points."epbackend.dispatchers"]
    mine = "my_package.dispatch:MyDispatcher"

Built-in names need no entry point, and no entry point can replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Literal, get_args

from epbackend.errors import UnavailableError, unknown_name

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""prefill: prompts are read, many tokens a step. decode: answers are written, one token a request and step."""
BOTH = "both"
"""Stands for both phases together."""

SplitName = Literal["even", "nearest", "level", "level_by_node"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
"""Which replica of its expert a token takes."""
LEVEL_BY_NODE: SplitName = "level_by_node"
LEVELLING: tuple[SplitName, ...] = ("level", LEVEL_BY_NODE)
"""Those that level the ranks batch by batch."""

AUTO = "auto"
"""Stands for the best device, or dispatcher, that can serve, and for a device's own kernels."""

KernelsName = Literal["auto", "triton", "triton_fast_fp8", "grouped_mm", "reference"]
FAST_FP8: KernelsName = "triton_fast_fp8"
CUDA_KERNELS: tuple[KernelsName, ...] = ("triton", FAST_FP8, "grouped_mm")
"""Those that device cuda alone has."""


@dataclass(frozen=True)
class NameTable:
    """The names of one kind of plugin, and what they stand for."""

    kind: str
    """How errors introduce a name."""
    group: str
    """The entry point group by which other packages add names."""
    built_in: Mapping[str, str]
    """Name -> `module:attribute`; the order is the order of preference."""

    def names(self) -> tuple[str, ...]:
        """Every name: the built-in ones in their order, then those of other packages."""
        return tuple(dict.fromkeys([*self.built_in, *sorted(entry_points(group=self.group).names)]))

    def load(self, name: str) -> Any:
        """What the name stands for.

        Raises:
            ConfigError: there is no such name.
            UnavailableError: the package that adds it does not load.
        """
        if name in self.built_in:
            return resolve_name(self.built_in[name])
        points = entry_points(group=self.group, name=name)
        if not points:
            raise unknown_name(self.kind, name, self.names())
        (point, *_) = points
        try:
            return point.load()
        except Exception as error:  # a package may raise anything when it is imported
            raise UnavailableError(
                f"{self.kind} {name!r} of {point.value} does not load: {error}; repair or remove that package"
            ) from error


DEVICES = NameTable(
    "device",
    "epbackend.devices",
    {
        "cuda": "epbackend.device.cuda:CudaDevice",
        "ascend": "epbackend.device.ascend:AscendDevice",
        "cpu": "epbackend.device.cpu:CpuDevice",
    },
)

PLANNERS = NameTable(
    "algorithm:",
    "epbackend.planners",
    {
        "refined": "epbackend.placement.planners.refined:plan_layers",
        "incremental": "epbackend.placement.planners.incremental:plan_layers",
        "eplb": "epbackend.placement.planners.eplb:plan_layers",
        "omni": "epbackend.placement.planners.omni:plan_layers",
        "lplb": "epbackend.placement.planners.lplb:plan_layers",
    },
)

DISPATCHERS = NameTable(
    "dispatcher",
    "epbackend.dispatchers",
    {
        "replicated": "epbackend.dispatch.replicated:Replicated",
        "allgather": "epbackend.dispatch.allgather:AllGather",
        "mc2": "epbackend.dispatch.mc2:Mc2",
        "symmetric": "epbackend.dispatch.symmetric:Symmetric",
        "alltoall": "epbackend.dispatch.alltoall:AllToAll",
        "deepep": "epbackend.dispatch.deepep:DeepEp",
    },
)


@dataclass(frozen=True)
class DispatcherFacts:
    """What decides, before a model or a rank is known, whether a dispatcher can serve a phase."""

    level: int
    """The `ep_level` that it serves."""
    phases: tuple[Phase, ...] = PHASES
    """Without "prefill" it serves only phases whose tokens are bounded."""
    needs_all_tokens: bool = False
    """Whether every rank must hold all tokens already."""

    @classmethod
    def of(cls, dispatcher: Any) -> DispatcherFacts:
        """What the class of a dispatcher says of itself."""
        return cls(dispatcher.level, dispatcher.phases, dispatcher.needs_all_tokens)


DISPATCHER_FACTS: Mapping[str, DispatcherFacts] = {
    "replicated": DispatcherFacts(level=1, needs_all_tokens=True),
    "allgather": DispatcherFacts(level=1),
    "mc2": DispatcherFacts(level=2, phases=("decode",)),
    "symmetric": DispatcherFacts(level=2),
    "alltoall": DispatcherFacts(level=2),
    "deepep": DispatcherFacts(level=2),
}
"""The built-in dispatchers' own facts, for those who must not import them, since they import torch."""


def dispatcher_facts(name: str) -> DispatcherFacts:
    """The facts of a dispatcher; that of another package is imported for them.

    Raises:
        ConfigError: there is no such dispatcher.
        UnavailableError: the package that adds it does not load.
    """
    return DISPATCHER_FACTS.get(name) or DispatcherFacts.of(DISPATCHERS.load(name))


def dispatcher_names(text: str) -> tuple[str, ...]:
    """The dispatchers that a text names, in order of preference; none for "auto".

    >>> dispatcher_names("symmetric, alltoall")
    ('symmetric', 'alltoall')
    >>> dispatcher_names("auto")
    ()
    """
    names = tuple(name.strip() for name in text.split(","))
    return () if names == (AUTO,) else names
