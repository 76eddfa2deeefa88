"""Two engines (dp 2), each with its own prompts, on shared experts: by Ray, LMDeploy's only way."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lmdeploy import GenerationConfig
from lmdeploy.messages import Response

import epbackend
from epbackend.engines.lmdeploy.dp_pipeline import ReplicatedPipeline
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.engines.lmdeploy.server.front import Front
from epbackend.engines.lmdeploy.server.serve import serve_model
from epbackend.errors import ConfigError, EPError, WorkerError
from epbackend.placement.placement import Placement
from tests.helpers.engine_models import NEW_TOKENS, TOP_K, prompts
from tests.helpers.engines import GREEDY, balanced, config
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import GENERATE
from tests.helpers.stand_ins import two_echoes


@pytest.fixture(scope="module")
def echoing() -> Iterator[ReplicatedPipeline]:
    with two_echoes() as pipe:
        yield pipe


def texts_of(responses: list[Response]) -> list[str]:
    return [each.text for each in responses]


def test_a_call_that_cannot_be_sent_leaves_no_answers_to_the_next(echoing):
    lock = GenerationConfig(logits_processors=[threading.Lock()])
    with pytest.raises(ConfigError, match=r"^gen_config: cannot be pickled \(.*lock"):
        echoing(["a", "b"], gen_config=[GenerationConfig(), lock])
    assert echoing("c").text == "answer to c"
    louder = GenerationConfig(logits_processors=[lambda prompt: prompt.upper()])
    assert texts_of(echoing(["a", "b"], gen_config=[GenerationConfig(), louder])) == [
        "answer to a",
        "answer to B",
    ]


def test_one_call_at_a_time(echoing):
    stream = echoing.stream_infer(["a", "b", "c", "d", "e"])
    assert next(stream).text == "answer to "
    with pytest.raises(EPError, match=r"another call of this pipeline is under way.* or close\(\) it"):
        echoing("f")
    assert len(list(stream)) == 9
    for _ in echoing.stream_infer(["a", "b", "c"]):
        break
    assert texts_of(echoing(["f", "g"])) == ["answer to f", "answer to g"]


def test_a_call_that_one_engine_cannot_answer_fails_alone(echoing):
    with pytest.raises(EPError, match="engine of dp rank 1 cannot answer: ValueError: no such token"):
        echoing(["a", "fails", "b"])
    assert texts_of(echoing(["f", "g"])) == ["answer to f", "answer to g"]


def test_after_an_engine_is_lost_every_call_says_so():
    with two_echoes() as pipe:
        for texts in (["a", "b", "c", "is lost"], "d"):
            with pytest.raises(WorkerError, match="rank 1 was killed"):
                pipe(texts)
    with pytest.raises(EPError, match="closed; make another"):
        pipe("e")


@pytest.mark.parametrize("kind", ["pipeline", "server"])
def test_a_start_that_fails_leaves_nothing(kind, monkeypatch):
    """No shared memory, no balancer, and the log as it was."""
    monkeypatch.setenv("RAY_ADDRESS", "nohost.invalid:6379")
    settings, placement = balanced({"dp": 2}, ep_size=2), Placement.even(4, 8, 2)
    before = _left_behind()
    arguments = (placement,) if kind == "pipeline" else (LOOPBACK, free_port(), placement, None, Front())
    start = ReplicatedPipeline if kind == "pipeline" else serve_model
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=nohost\.invalid:6379"):
        start("none", settings, *arguments)
    assert _left_behind() == before


def _left_behind() -> tuple[Any, ...]:
    log = logging.getLogger("epbackend")
    segments = {each.name for each in Path("/dev/shm").iterdir() if each.stat().st_uid == os.getuid()}
    return segments, {each.name for each in threading.enumerate()}, log.level, list(log.handlers)


@pytest.mark.parametrize("name", ["chat", "session", "get_ppl", "get_reward_score", "batch_infer"])
def test_a_method_of_lmdeploys_that_it_lacks_is_named(name):
    pipe = ReplicatedPipeline.__new__(ReplicatedPipeline)  # starts no engine
    with pytest.raises(AttributeError, match=rf"engine\.dp > 1 has no {name}: .*dp: 1"):
        getattr(pipe, name)


def test_two_engines_give_the_tokens_of_one_with_uneven_and_empty_ranks(checkpoint, reference):
    """One prompt alone, while the other engine has nothing to do; then twelve of 1 to 150 words go round."""
    texts, expected = prompts(), reference("qwen3-moe")
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), config({"dp": 2}, ep_size=2, ep_level=2)) as pipe:
        alone = pipe(texts[4], gen_config=GREEDY, do_preprocess=False)
        load_alone = pipe.load()
        crowd = pipe(texts, gen_config=GREEDY, do_preprocess=False)
        with pytest.raises(ConfigError, match=r"^sessions: "):
            pipe(texts, sessions=[])
        parts = list(pipe.stream_infer(texts[1:4], gen_config=GREEDY, do_preprocess=False))
        load = pipe.load()
        mine = [engine for engine in pipe._processes if engine.is_alive()]
    assert [answer.token_ids for answer in crowd] == expected
    assert alone.token_ids == expected[4]
    # What the other engine makes up, to take part, is no load. The last new token may be fed back or not.
    fed = alone.input_token_len + NEW_TOKENS - 1
    for routed in load_alone.tokens_RYE.sum(axis=(0, 2)):
        assert fed * TOP_K <= routed <= (fed + 1) * TOP_K
    for index in range(3):
        told = [part.token_ids for part in parts if part.index == index and part.token_ids]
        assert [token for tokens in told for token in tokens] == expected[1 + index]
        assert len(told) > 1, "the whole answer came at once"
    assert len(mine) == 2
    assert all(tokens > 0 for tokens in load.tokens_per_rank)
    assert load.dispatchers["decode"]["name"] == "alltoall"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("deepseek-v3", config({"dp": 2}, ep_size=4, ep_level=2)),
        ("deepseek-v2", config({"dp": 2}, ep_size=4, ep_level=1)),
        ("deepseek-v3", config({"dp": 2}, ep_size=2, ep_level=1)),
    ],
)
def test_two_engines_with_attention_ranks_give_the_tokens_of_one(form, settings, checkpoint, reference):
    """Among them the mixed form: two engines with two attention ranks each."""
    with epbackend.pipeline(str(checkpoint(form)), settings) as pipe:
        answers = pipe(prompts(), gen_config=GREEDY, do_preprocess=False)
    assert [answer.token_ids for answer in answers] == reference(form)


@pytest.mark.slow
def test_a_killed_engine_fails_the_call_by_name(checkpoint):
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), config({"dp": 2}, ep_size=2)) as pipe:
        pipe._processes[1].kill()
        with pytest.raises(WorkerError, match="dp rank 1"):
            pipe(prompts(), gen_config=GREEDY, do_preprocess=False)


@pytest.mark.slow
def test_nothing_is_left_of_ray_when_the_parent_is_killed(checkpoint, start_process):
    settings = config({"dp": 2}, ep_size=2)
    running = start_process(GENERATE, str(checkpoint("qwen3-moe")), settings.to_json())
    running.process.kill()
    running.process.wait(timeout=PATIENCE_S)
    running.assert_nothing_left()
