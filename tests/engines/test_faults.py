"""A server of which a process is stopped or killed: seen from outside, as its clients and its supervisor do."""

from __future__ import annotations

import os
import signal
import time

import pytest
import requests

from benchmarks import faults
from benchmarks.faults import Case, Server
from epbackend.errors import ENGINE_FAILED


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(victim="rank 1", signal="SIGSTOP", phase="decode"), "rank 1 is stopped"),
        pytest.param(
            Case(ep=4, victim="rank 3", signal="SIGSTOP", phase="prefill"),
            "rank 3 is stopped",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(victim="rank 0", signal="SIGSTOP", phase="idle"), "rank 0 is stopped", marks=pytest.mark.slow
        ),
        pytest.param(
            Case(victim="engine", signal="SIGSTOP"),
            "process .* of the engine .* is stopped",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(dp=2, executor="ray", victim="rank 1", signal="SIGKILL"),
            "rank 1 ended",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(dp=2, executor="ray", victim="rank 0", signal="SIGSTOP"),
            "rank 0 is stopped",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(dp=2, executor="ray", victim="raylet", signal="SIGKILL"), "raylet", marks=pytest.mark.slow
        ),
        pytest.param(
            Case(executor="ray", victim="gcs", signal="SIGKILL"), "control store", marks=pytest.mark.slow
        ),
        pytest.param(
            Case(dp=2, executor="ray", victim="rank 1", signal="SIGKILL", phase="idle"),
            "rank 1 ended",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: (
        f"{value.signal}-{value.victim}-{value.phase}-dp{value.dp}" if isinstance(value, Case) else ""
    ),
)
def test_a_lost_process_is_named_to_clients_and_probes_and_ends_the_server(case, said):
    outcome = faults.run(case)
    if case.phase != "idle":
        assert outcome.client_status == "503"
        assert faults.says(said, outcome.client_text), outcome.client_text
    assert faults.says(said, outcome.health_text), outcome.health_text
    assert (outcome.exit_code, outcome.left) == (ENGINE_FAILED, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(victim="planner"),
        Case(victim="everything", phase="idle", resume_s=10.0),
        Case(victim="everything", phase="decode", resume_s=10.0),
    ],
    ids=lambda case: f"{case.victim}-{case.phase}",
)
def test_a_server_outlives_its_planner_and_a_pause_of_all_its_processes(case):
    """As by Ctrl-Z, or of a container that is frozen; longer than `timeout_s`, and in the middle of a step too."""
    outcome = faults.run(case)
    assert (outcome.client_status, outcome.health_s, outcome.exit_s) == ("", None, None)
    assert (outcome.answers, outcome.exit_code, outcome.left) == (True, 0, [])


@pytest.mark.slow
def test_a_server_that_is_killed_takes_all_that_it_started_with_it():
    outcome = faults.run(Case(dp=2, executor="ray", victim="server", signal="SIGKILL"))
    assert (outcome.client_status, outcome.exit_code, outcome.left) == ("hung up", -signal.SIGKILL, [])


@pytest.mark.slow
def test_a_failed_engine_is_started_again_and_a_signal_ends_it_with_0(tmp_path):
    server = Server(Case(timeout_s=60), tmp_path, "--restart", "1")
    try:
        server.await_ready()
        os.kill(*server.pids_of("rank 1", 2), signal.SIGKILL)
        # In each process of its own: the one that failed answers 503 first, then nobody listens.
        while _answers(server):
            time.sleep(0.1)
        server.await_ready()
        assert faults.complete(server, "the quick", 4).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=faults.PATIENCE_S) == 0
        assert server.left() == []
    finally:
        server.kill()


def _answers(server: Server) -> bool:
    try:
        return requests.get(server.url("/ready"), timeout=5).status_code == 200
    except requests.RequestException:
        return False
