"""However an engine ends, it ends promptly, says why, and leaves no process and no shared memory behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from lmdeploy import GenerationConfig

import epbackend
from epbackend import EPConfig
from epbackend.engines.lmdeploy.load.status import local_engines
from epbackend.errors import WorkerError
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import GENERATE, engine_workers

TWO_RANKS = EPConfig.load({"device": "cpu", "ep_size": 2, "ep_level": 2, "engine": {"session_len": 400}})


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
    ids=lambda ending: ending.name,
)
def test_no_process_or_memory_is_left_when_the_parent_is_signalled(ending, checkpoint, start_process):
    running = start_process(GENERATE, str(checkpoint("qwen3-moe")), TWO_RANKS.to_json())
    assert len(running.workers()) == 2
    assert running.segments
    stats, deadline = local_engines()[running.process.pid], time.monotonic() + PATIENCE_S
    # In the middle of generating, with the ranks in a collective more often than not.
    while stats.latest().calls < 10:
        assert time.monotonic() < deadline
        time.sleep(0.02)

    if ending is signal.SIGKILL:
        running.process.kill()
    else:
        os.killpg(
            running.process.pid, ending
        )  # as by Ctrl-C, or a terminal that is closed: every process gets it

    running.process.wait(timeout=PATIENCE_S)
    running.assert_nothing_left()


@pytest.mark.usefixtures("forked_ranks")
def test_a_worker_killed_while_generating_fails_the_call(checkpoint):
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), TWO_RANKS) as pipe:
        pipe(["hello"], gen_config=GenerationConfig(max_new_tokens=2))
        killer = threading.Thread(target=_kill_in_a_call, args=(pipe, engine_workers()[1]), daemon=True)
        killer.start()
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"rank 1 was killed by SIGKILL"):
            _generate_for(PATIENCE_S, pipe)
        killer.join()
        assert time.monotonic() < began + TWO_RANKS.timeout_s  # not by the collective that waits
        for call in (lambda: pipe("hello"), lambda: pipe.chat("hello"), lambda: pipe.get_ppl([1, 2, 3])):
            with pytest.raises(WorkerError, match="rank 1"):
                call()
    assert engine_workers() == []


@pytest.mark.usefixtures("forked_ranks")
def test_a_worker_killed_at_start_fails_the_start(checkpoint):
    killed_at = 0.0

    def kill_first() -> None:
        nonlocal killed_at
        while not (workers := engine_workers()):
            time.sleep(0.02)
        workers[0].kill()
        killed_at = time.monotonic()

    killer = threading.Thread(target=kill_first)
    killer.start()
    with pytest.raises(WorkerError, match=r"rank 0 was killed by SIGKILL"):
        epbackend.pipeline(str(checkpoint("qwen3-moe")), TWO_RANKS)
    killer.join()
    assert time.monotonic() < killed_at + TWO_RANKS.timeout_s
    assert engine_workers() == []


@pytest.mark.slow  # the default run has it in test_weight_check.py and, in a server, in test_server.py
def test_the_error_of_a_failed_worker_is_quoted(checkpoint):
    """The weights do not have the shape that the settings claim: found by the workers, told by the parent."""
    broken = EPConfig.load(
        {"device": "cpu", "ep_size": 2, "engine": {"extra": {"hf_overrides": {"hidden_size": 96}}}}
    )
    with pytest.raises(
        WorkerError, match=r"rank [01] failed: .*ConfigError: .*cannot be loaded: Attempted to load weight"
    ):
        epbackend.pipeline(str(checkpoint("qwen3-moe")), broken)
    assert engine_workers() == []


def _kill_in_a_call(pipe, victim) -> None:
    calls = pipe.load().calls
    while pipe.load().calls < calls + 2:
        time.sleep(0.02)
    victim.kill()


def _generate_for(seconds: float, pipe) -> None:
    endless = GenerationConfig(max_new_tokens=390, ignore_eos=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pipe(["the quick"] * 4, gen_config=endless, do_preprocess=False)
