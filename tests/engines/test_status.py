"""What is seen of the experts from outside: status, metrics, the dashboard that draws them, and who may ask."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from starlette.testclient import TestClient
from typer.testing import CliRunner

from epbackend.balance.balancer import Balancer, BalanceReport, Options, Reading
from epbackend.balance.board import Board
from epbackend.balance.decision import Policy
from epbackend.cli import app as command
from epbackend.cli.top import View, drawn
from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE, SharedStats, StatsReader
from epbackend.engines.lmdeploy.load.status import local_engines, status
from epbackend.engines.lmdeploy.server import experts
from epbackend.engines.lmdeploy.server.metrics import BALANCE, LOAD, ExpertMetrics
from epbackend.errors import EPError
from epbackend.placement.placement import Placement
from tests.helpers.engines import config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import ROOT

EVERY_METRIC = (*LOAD, *BALANCE)
PLACEMENT = Placement.even(4, 8, 2)


@pytest.fixture
def stats():
    """Two ranks with MoE layers 1 and 3, of which rank 1 has done three times as much."""
    made = SharedStats.of(
        config(ep_size=2, placement={"split": "level"}, balance={"on": True, "redundant_experts": 8})
    )
    for row, tokens in zip(made._ranks, (10, 30), strict=True):
        row["layers"][[1, 3]] = True
        row["experts"], row["top_k"], row["steps"] = 8, 2, 5
        row["tokens"][0, [1, 3], 0] = tokens, 0  # layer 3 has decoded alone
        row["tokens"][1, [1, 3], 0] = 0, 2 * tokens
    yield made
    made.remove()


def told(stats, **changes):
    report = BalanceReport(windows=7, migrations=3, bytes_moved=1000, longest_flip_ms=2.0, **changes)
    stats.tell(balance=vars(report), balance_at=0.0)


def exported(stats):
    registry = CollectorRegistry()
    registry.register(ExpertMetrics(stats))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (each.name, *sorted(each.labels.items())): each.value
        for family in families
        for each in family.samples
    }


def test_the_status_is_read_from_the_memory_of_the_load_report_alone(stats):
    """By any process, which then sees what the owner has told since."""
    reader = StatsReader.attach(stats.variable)
    assert status(reader)["balance"] is None
    told(stats, planner_age_s=1.0)
    found = json.loads(json.dumps(status(reader)))
    assert found["tokens_RY"] == [[10, 20], [30, 60]]
    assert found["tokens_of_phase"] == {"prefill": [[10, 0], [30, 0]], "decode": [[0, 20], [0, 60]]}
    assert (found["layers"], found["experts"], found["top_k"], found["steps"]) == ([1, 3], 8, 2, 5)
    assert found["split"] == {"prefill": "level", "decode": "level"}
    assert found["balance"]["windows"] == 7
    assert found["balance"]["planner_age_s"] > 1.0


def test_an_engine_of_this_machine_is_found_by_its_process(stats):
    environment = os.environ | {STATS_VARIABLE: stats.variable}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE) as child:
        assert os.getpid() in local_engines()
        shown = CliRunner().invoke(command, ["top", str(os.getpid()), "--json", "--interval", "0.2"])
        assert json.loads(shown.stdout)["imbalance"] == 1.5
        child.stdin.close()
    missing = CliRunner().invoke(command, ["top", str(child.pid), "--once"])
    assert missing.exit_code == 2


def test_a_segment_that_is_gone_or_of_another_release_is_refused(stats):
    variable = stats.variable
    with pytest.raises(EPError, match="not made by this release"):
        StatsReader.attach(f"7:{variable.partition(':')[2]}")
    with pytest.raises(EPError, match="has ended"):
        StatsReader.attach("2:psm_none")


def test_no_more_is_told_than_has_room(stats):
    with pytest.raises(EPError, match="8192"):
        stats.tell(balance="x" * 9000)


def test_every_metric_is_exported_with_its_unit(stats):
    decoded = "epbackend_expert_tokens_total", ("layer", "3"), ("phase", "decode"), ("rank", "1")
    assert exported(stats)[decoded] == 60
    assert not [name for name, *_ in exported(stats) if "_balance_" in name]  # it is off
    told(stats, imbalance_before=1.5, imbalance_after=1.1)
    found = exported(stats)
    assert {name for name, *_ in found} == {each.name for each in EVERY_METRIC}
    assert found[("epbackend_balance_longest_flip_seconds",)] == 0.002
    assert found[("epbackend_balance_moved_bytes_total",)] == 1000
    for each in EVERY_METRIC:
        labels = {label for name, *rest in found for label, _ in rest if name == each.name}
        assert labels == set(each.labels)
        assert each.name.endswith("_total") == (each.kind == "counter")


def test_the_documentation_lists_every_metric():
    text = (ROOT / "docs" / "balance.md").read_text(encoding="utf-8")
    for each in EVERY_METRIC:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        assert f"| `{each.name}` | {each.kind} | {labels} | {each.meaning} |" in text, each.name


def test_the_dashboard_asks_for_metrics_that_are_exported():
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    names = {name for expression in asked for name in re.findall(r"epbackend_\w+", expression)}
    assert names == {each.name for each in EVERY_METRIC}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    labels = {
        label
        for expression in asked
        for group in re.findall(r"by \((\w+)\)", expression)
        for label in group.split(",")
    }
    assert labels <= {label for each in LOAD for label in each.labels}


def test_a_client_needs_the_key_and_learns_why_nothing_moves(stats):
    client = TestClient(experts.ExpertEndpoints(stats, PLACEMENT, None).app(["secret"]))
    key = {"Authorization": "Bearer secret"}
    for ask in (client.get, client.post):
        assert ask("/epbackend/rebalance").status_code == 401
    assert client.get("/epbackend/status").status_code == 401
    assert client.get("/epbackend/status", headers=key).json()["steps"] == 5
    answer = client.get("/epbackend/placement", headers=key)
    assert Placement.from_json(answer.text) == PLACEMENT
    refused = client.post("/epbackend/rebalance", headers=key)
    assert (refused.status_code, "balance.on" in refused.json()["error"]["message"]) == (409, True)
    open_to_all = TestClient(experts.ExpertEndpoints(stats, None, None).app([]))
    assert open_to_all.get("/epbackend/placement").status_code == 404


def test_a_look_that_is_asked_for_does_not_wait_for_the_interval(stats, monkeypatch):
    """On loads of few steps; what it says when it is over, takes too long, or never comes."""
    monkeypatch.setattr(experts, "WAIT_S", PATIENCE_S)
    steps = iter(range(1000))

    def read():
        step = next(steps)
        return Reading(step, np.full((2, 2, 4, 8), step))

    options = Options(1000, 1000.0, partial(Policy, 0.9, None, None), 1 << 20, "all", 5.0)
    stats.places["layers"], stats.places["expert_bytes"] = 4, 100
    balancer = Balancer(Board(stats.places), read, options, PLACEMENT)
    try:
        client = TestClient(experts.ExpertEndpoints(stats, PLACEMENT, balancer).app([]))
        told(stats)
        assert client.post("/epbackend/rebalance").status_code == 200
        assert balancer.report().windows == 1  # level already: nothing moved
        monkeypatch.setattr(experts, "WAIT_S", 0.0)
        assert client.post("/epbackend/rebalance").status_code == 202
    finally:
        balancer.close()
    assert client.post("/epbackend/rebalance").status_code == 503


def test_the_view_shows_the_ranks_and_layers_of_the_last_seconds(stats):
    told(stats, imbalance_before=1.5, imbalance_after=1.1, last_error="rank 1: no memory")
    before = status(stats)
    now = before | {"at_s": before["at_s"] + 2.0, "steps": 9}
    now["tokens_of_phase"] = {"prefill": [[25, 0], [30, 0]], "decode": [[5, 30], [0, 70]]}
    view = View.between(before, now)
    assert view.tokens_RY.tolist() == [[20, 10], [0, 10]]
    assert view.tokens_per_second == 20 / 2 / 2.0
    assert view.imbalance == 1.5
    text = _text(drawn(view, 100, 40), 100)
    assert view.phases["prefill"] == {"share": 0.375, "imbalance": 1.5}
    assert "decode 62% of the tokens, 1.500" in text
    for part in ("2.00", "5 tokens/s", "1.500 to 1.100", "3 migrations", "rank 1: no memory"):
        assert part in text
    idle = View.between(before, before | {"at_s": before["at_s"] + 2.0})
    assert (idle.idle, idle.tokens_RY.tolist()) == (True, before["tokens_RY"])
    assert "idle" in _text(drawn(idle, 100, None), 100)


@pytest.mark.parametrize(("ranks", "layers"), [(1, 1), (300, 61), (8, 0)])
def test_any_number_of_ranks_and_layers_fits_the_terminal(ranks, layers):
    tokens_RY = np.random.default_rng(0).integers(0, 9, (ranks, layers)).tolist()
    state = {
        "at_s": 1.0, "ep_size": ranks, "layers": list(range(layers)), "experts": 8, "top_k": 2, "steps": 3,
        "tokens_of_phase": {"prefill": tokens_RY, "decode": tokens_RY}, "step_imbalance_Y": [1.0] * layers,
        "split": {}, "dispatchers": {}, "balance": None,
    }  # fmt: skip
    lines = _text(drawn(View.between(state | {"steps": 0}, state | {"at_s": 2.0}), 80, 24)).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("ftp://host", "is no URL of a server"),
        ("http://127.0.0.1:9", "does not answer"),
        ("engine", "neither a URL"),
    ],
)
def test_what_top_cannot_watch_is_one_line(argument, said):
    result = CliRunner().invoke(command, ["top", argument, "--once"])
    assert result.exit_code == 2
    assert said in result.output


def _text(view, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()
