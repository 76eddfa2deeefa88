"""The default planner: replicas that are as light as they can be, bin packed, then exchanged until nothing helps.

1. Replicas: one at a time to the expert whose replicas weigh most, which minimises the heaviest replica. Where
   activated experts cost, the replicas that add least are tried too.
2. Bin packing: the heaviest replica first, to the rank that is cheapest with it, never two of an expert on one rank.
3. Refinement: swaps and replaced replicas that relieve the worst rank. Small layers get random kicks and refinement
   after each, and all layers do as long as `search_ms` lasts.

If the layout in order is better still, it is taken instead. The answer to a task is always the same, unless it has
`search_ms`: then the clock decides how many kicks there are.

Options:

- `kicks`: how many per layer before any `search_ms`; by the size of the layer unless given.
- `windows`: "mixture" (the default) or "worst": balance the mixture of several windows, or the worst of them.
- `node_penalty`, with `node_size`: what a crowded replica may cost, in mean rank loads; one that shares its node with
  another of its expert while a node has none, so that `nearest` finds replicas close by. With 0.001 the worst rank may
  get 0.1% more load to avoid one.
- `split`: "even" (the default) or "level", the split that batches will get. For "level" the replicas connect the ranks,
  so that any batch can be balanced (see `planners.level`); tokens are then the only objective, and the options above
  are refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from epbackend.errors import ConfigError, whole_number
from epbackend.placement.budget import first_slots, share_out
from epbackend.placement.objectives import TOKENS
from epbackend.placement.placement import Layout
from epbackend.placement.planners import level
from epbackend.placement.planners.base import Task, all_layers, refuse_options
from epbackend.placement.planners.search_inputs import SearchInputs

if TYPE_CHECKING:
    from epbackend.placement.search.layer_search import LayerProblem

EVEN_OPTIONS = ("kicks", "node_penalty", "windows")
"""Those that are refused with split level."""
OPTIONS = (*EVEN_OPTIONS, "split")
PLANNED_FOR = ("even", "level")
"""What the option `split` may be."""

USUAL_KICKS = 2**16
"""Kicks of a layer, times its slots squared: many for a toy, none for 256 experts, which take about as long."""


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module."""
    from epbackend.placement.search.compiled import announce
    from epbackend.placement.search.layer_search import improve

    refuse_options("refined", task, OPTIONS)
    plan_layer = _plan_for_level if _split(task) == "level" else _plan_for_even
    inputs = SearchInputs.of(task)
    slots_Y = np.full(task.loads.layers, task.slots)
    if task.budget is not None:
        slots_Y = share_out(inputs.weight_YE, task.ranks, task.slots, task.budget)
    loaded = task.loads.loaded_layers
    first_YR = first_slots(slots_Y[list(loaded)], task.ranks)
    if task.slots_R:
        first_YR = np.tile(task.first_R(), (len(loaded), 1))
    planned = {}
    announce(improve)
    for done, layer in enumerate(loaded):
        planned[layer] = plan_layer(task, inputs, layer, first_YR[done])
        task.progress(done + 1, len(loaded))
    return all_layers(task, planned)


def _split(task: Task) -> str:
    """The option `split`. Raises ConfigError for what `level` cannot go with."""
    split = task.options.get("split", PLANNED_FOR[0])
    if split not in PLANNED_FOR:
        raise ConfigError(f"split: must be {' or '.join(PLANNED_FOR)}, not {split!r}")
    if split == "level":
        if task.objective != TOKENS:
            raise ConfigError(
                f"objective: the level split levels tokens, not {task.objective.name}; use objective tokens, "
                "or plan with split even"
            )
        for name in EVEN_OPTIONS:
            if name in task.options:
                raise ConfigError(
                    f"{name}: plays no part with split level; leave it out, or plan with split even"
                )
    return split


def _plan_for_level(task: Task, inputs: SearchInputs, layer: int, first_R: np.ndarray) -> Layout:
    even = _plan_for_even(replace(task, search_ms=0.0), inputs, layer, first_R)
    even_P = even.slot_to_expert_P.copy()  # numba would compile once more for a read-only array
    expert_P = level.plan_layer(
        task.loads.windows_of(layer), first_R, even_P, inputs.slow_R, task.search_ms, task.seed % 2**32
    )
    return _sorted_on_ranks(expert_P, first_R, even.experts)


def _plan_for_even(task: Task, inputs: SearchInputs, layer: int, first_R: np.ndarray) -> Layout:
    from epbackend.placement.search.layer_search import improve, slots_cost

    problem = inputs.problem(layer, first_R)
    slots, experts = problem.rank_P.size, task.loads.experts
    kicks = whole_number("kicks", task.options.get("kicks", USUAL_KICKS // slots**2))
    seed = task.seed % 2**32
    answers = [
        (*improve(problem, start_P, start_P, kicks, seed), start_P)
        for start_P in _starts(problem, inputs.weight_YE[layer])
    ]
    expert_P, cost, start_P = min(answers, key=lambda answer: answer[1])
    expert_P, cost = _search(problem, expert_P, cost, start_P, task.search_ms / 1e3, seed)
    in_order_P = np.arange(slots) % experts
    if slots_cost(problem, in_order_P) < cost:
        expert_P = in_order_P
    return _sorted_on_ranks(expert_P, first_R, experts)


def _sorted_on_ranks(expert_P: np.ndarray, first_R: np.ndarray, experts: int) -> Layout:
    """Experts in ascending order on each rank: the order has no meaning, so this one is easy to read and compare."""
    rank_P = np.repeat(np.arange(first_R.size - 1), np.diff(first_R))
    return Layout.cut(np.sort(rank_P * experts + expert_P) % experts, first_R, experts)


def _starts(problem: LayerProblem, weight_E: np.ndarray) -> Iterator[np.ndarray]:
    """Bin-packed layers [P] to refine."""
    from epbackend.placement.search.layer_search import bin_pack, cheapest_replicas, optimal_replicas

    slots, ranks = problem.rank_P.size, problem.node_R.size
    replicas_E = optimal_replicas(weight_E, np.argsort(-weight_E, kind="stable"), slots, ranks)
    yield bin_pack(problem, replicas_E, np.argsort(-weight_E / replicas_E, kind="stable"))
    if problem.batch:
        replicas_E = cheapest_replicas(problem)
        yield bin_pack(problem, replicas_E, np.argsort(-weight_E / replicas_E, kind="stable"))


def _search(
    problem: LayerProblem, expert_P: np.ndarray, cost: float, start_P: np.ndarray, seconds: float, seed: int
) -> tuple[np.ndarray, float]:
    """Kicks until the time is over: at first a few, then each time as many as fit into half of the time left."""
    from epbackend.placement.search.layer_search import improve

    began = time.perf_counter()
    done, kicks = 0, 8
    while (left := seconds - (time.perf_counter() - began)) > 0:
        if done:
            kicks = max(1, int(done / (time.perf_counter() - began) * left / 2))
        expert_P, cost = improve(problem, expert_P, start_P, kicks, seed + 1 + done)
        done += kicks
    return expert_P, cost
