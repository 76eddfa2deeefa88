"""The experts' load and the balance of ranks as Prometheus metrics, beside LMDeploy's own at `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector

from epbackend.engines.lmdeploy.load.report import StatsReader
from epbackend.engines.lmdeploy.load.status import status


@dataclass(frozen=True)
class Known:
    """A metric that is exported; docs/balance.md lists them."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    balance_field: str = ""
    """The field of BalanceReport that it shows; "": it is one of the load's."""
    scale: float = 1.0
    """Of that field's unit in the metric's."""


LOAD = (
    Known(
        "epbackend_expert_tokens_total",
        "counter",
        ("rank", "layer", "phase"),
        "tokens that the rank's experts computed",
    ),
    Known("epbackend_steps_total", "counter", (), "forward passes of the model"),
    Known(
        "epbackend_step_imbalance_ratio",
        "gauge",
        ("layer",),
        "tokens of a step's busiest rank over the ranks' mean, in the last thousand steps",
    ),
)
BALANCE = (
    Known(
        "epbackend_balance_windows_total", "counter", (), "windows of loads that were looked at", "windows"
    ),
    Known("epbackend_balance_plans_total", "counter", (), "new placements that were worth it", "plans"),
    Known("epbackend_balance_migrations_total", "counter", (), "changes of one layer", "migrations"),
    Known("epbackend_balance_failed_migrations_total", "counter", (), "those that changed nothing", "failed"),
    Known(
        "epbackend_balance_moved_slots_total", "counter", (), "slots that got another expert", "slots_moved"
    ),
    Known("epbackend_balance_moved_bytes_total", "counter", (), "bytes between ranks", "bytes_moved"),
    Known(
        "epbackend_balance_longest_flip_seconds",
        "gauge",
        (),
        "the most that a migration has held a rank up",
        "longest_flip_ms",
        1e-3,
    ),
    Known(
        "epbackend_balance_planner_age_seconds",
        "gauge",
        (),
        "since the planner's process was started",
        "planner_age_s",
    ),
    Known(
        "epbackend_balance_planner_restarts_total",
        "counter",
        (),
        "planners that ended or hung, and were replaced",
        "planner_restarts",
    ),
    Known(
        "epbackend_balance_imbalance_before_ratio",
        "gauge",
        (),
        "busiest rank over the mean that the last plan started from",
        "imbalance_before",
    ),
    Known(
        "epbackend_balance_imbalance_after_ratio",
        "gauge",
        (),
        "busiest rank over the mean that the last plan expected",
        "imbalance_after",
    ),
)


class ExpertMetrics(Collector):
    """Collects from a deployment's load report; asks no rank, so a scrape costs serving nothing."""

    def __init__(self, stats: StatsReader) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return [Metric(each.name, each.meaning, each.kind) for each in (*LOAD, *BALANCE)]

    def collect(self) -> Iterator[Metric]:
        found = status(self._stats)
        samples: dict[str, list[tuple[dict[str, str], float]]] = {
            "epbackend_expert_tokens_total": [
                ({"rank": str(rank), "layer": str(layer), "phase": phase}, tokens)
                for phase, tokens_RY in found["tokens_of_phase"].items()
                for rank, tokens_Y in enumerate(tokens_RY)
                for layer, tokens in zip(found["layers"], tokens_Y, strict=True)
            ],
            "epbackend_steps_total": [({}, found["steps"])],
            "epbackend_step_imbalance_ratio": [
                ({"layer": str(layer)}, ratio)
                for layer, ratio in zip(found["layers"], found["step_imbalance_Y"], strict=True)
            ],
        }
        for each in LOAD:
            yield _family(each, samples[each.name])
        for each in BALANCE if found["balance"] else ():
            value: Any = found["balance"][each.balance_field]
            yield _family(each, [] if value is None else [({}, each.scale * value)])

    def __enter__(self) -> ExpertMetrics:
        """Inside, LMDeploy's server of this process shows them."""
        REGISTRY.register(self)
        return self

    def __exit__(self, *_: object) -> None:
        REGISTRY.unregister(self)


def _family(known: Known, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    family = Metric(known.name.removesuffix("_total"), known.meaning, known.kind)
    for labels, value in samples:
        family.add_sample(known.name, labels, value)
    return family
