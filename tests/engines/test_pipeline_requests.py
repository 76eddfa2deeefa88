"""Requests from Python: one that cannot be served fails alone, options have their effect, any processor works."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmdeploy import GenerationConfig
from lmdeploy.pytorch.engine.guided_process import GuidedDecodingManager
from transformers import AutoTokenizer

import epbackend
from epbackend.engines.lmdeploy.patches import requests
from epbackend.engines.lmdeploy.requests import response_formats
from epbackend.errors import ConfigError
from tests.helpers.engine_models import prompts
from tests.helpers.engines import GREEDY, config
from tests.helpers.patience import PATIENCE_S

pytestmark = pytest.mark.usefixtures("forked_ranks")

CONFIG = config({"max_batch_size": 8}, ep_size=2)


@pytest.fixture(scope="module")
def pipe(checkpoint: Callable[[str], Path]) -> Iterator[Any]:
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), CONFIG) as pipe:
        yield pipe


@pytest.fixture(autouse=True)
def _unplugged() -> None:
    """The module's pipeline stays plugged in from test to test."""


def always(token: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A processor that no other process could import."""
    return lambda ids, logits: torch.full_like(logits, -100.0).index_fill_(0, torch.tensor([token]), 0.0)


@pytest.fixture
def heeded_ctrl_c():
    """Who is started in the background by a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["break", "ctrl-c"])
def test_what_nobody_reads_is_not_computed(how, pipe, heeded_ctrl_c):
    """Some of it has begun, some not; and the next request is answered as ever."""
    endless = GenerationConfig(max_new_tokens=300, ignore_eos=True, do_sample=False)
    pool = pipe.session_mgr.request_handle_pool
    many = [prompts()[0]] * (pool.size + 2)
    expected = pipe(prompts()[1], gen_config=GREEDY, do_preprocess=False).token_ids
    steps = pipe.load().calls
    if how == "break":
        for _ in pipe.stream_infer(many, gen_config=endless, do_preprocess=False):
            break
    else:
        interrupting = threading.Thread(target=_interrupt_after, args=(pipe, steps + 2))
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            pipe(many, gen_config=endless, do_preprocess=False)
        interrupting.join()
    assert pipe(prompts()[1], gen_config=GREEDY, do_preprocess=False).token_ids == expected
    deadline = time.monotonic() + PATIENCE_S
    while pool.num_dispatched:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert pipe.load().calls < steps + 200


def _interrupt_after(pipe, steps: int) -> None:
    while pipe.load().calls < steps:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_prompts_and_processors_fail_alone(pipe, reference):
    """In one batch with good ones, which are answered as ever."""
    seen: list[int] = []

    def fails_later(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        if len(seen) == 3:
            raise RuntimeError("no more")
        return logits

    texts = prompts()[:4]
    answers = pipe(
        [texts[0], "", texts[1], texts[2], texts[3], texts[0]],
        gen_config=[
            GREEDY,
            GREEDY,
            replace(GREEDY, logits_processors=[always(7)]),
            replace(GREEDY, logits_processors=[fails_later]),
            GREEDY,
            replace(GREEDY, stop_token_ids=[999999]),
        ],
        do_preprocess=False,
    )
    assert [answer.finish_reason for answer in answers] == [
        "length",
        "error",
        "length",
        "error",
        "length",
        "error",
    ]
    assert "prompt: must not be empty" in answers[1].error_message
    assert "stop_token_ids: token id 999999" in answers[5].error_message
    assert answers[2].token_ids == [7] * GREEDY.max_new_tokens
    assert [answers[0].token_ids, answers[4].token_ids] == [reference("qwen3-moe")[i] for i in (0, 3)]
    again = pipe(texts, gen_config=GREEDY, do_preprocess=False)
    assert [answer.token_ids for answer in again] == reference("qwen3-moe")[:4]


def test_log_probabilities_of_a_prompt_are_read_beside_others_answers(pipe, reference):
    """All of them wait at once: LMDeploy would put them into one batch."""
    texts = prompts()[:3]
    reading = GenerationConfig(max_new_tokens=0, logprobs=1, logprob_start_len=0)
    alone = pipe(texts[1], gen_config=reading, do_preprocess=False)
    assert alone.finish_reason == "length"
    for configs in ([GREEDY, reading, GREEDY], [reading, reading, GREEDY]):
        answers = pipe(texts, gen_config=configs, do_preprocess=False)
        assert answers[1].logprobs[0].keys() == alone.logprobs[0].keys()
        for place in range(3):
            if configs[place] is GREEDY:
                assert answers[place].token_ids == reference("qwen3-moe")[place]


def test_a_prompt_may_fill_its_session(pipe, reference):
    """LMDeploy's ranks ended with the next answer."""
    (perplexity,) = pipe.get_ppl([[5] * pipe.async_engine.session_len])
    assert perplexity > 1
    for _ in range(2):
        answers = pipe(prompts()[:2], gen_config=GREEDY, do_preprocess=False)
        assert [answer.token_ids for answer in answers] == reference("qwen3-moe")[:2]


def test_processors_see_a_sequence_without_padding(pipe, checkpoint):
    """In a batch of sequences of several lengths, some of which join later and some without processors."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen3-moe"))
    texts = prompts()

    def prompt_echoed(prompt: list[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def echo(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            right = ids[: len(prompt)].tolist() == prompt
            token = prompt[(len(ids) - len(prompt)) % len(prompt)] if right else 0
            return torch.full_like(logits, -100.0).index_fill_(0, torch.tensor([token]), 0.0)

        return echo

    ids = [tokenizer(text).input_ids for text in texts]
    configs = [
        replace(
            GREEDY,
            max_new_tokens=4 + place,
            logits_processors=None if place % 3 == 0 else [prompt_echoed(ids[place])],
        )
        for place in range(len(texts))
    ]
    answers = pipe(texts, gen_config=configs, do_preprocess=False)
    for place, answer in enumerate(answers):
        if place % 3:
            expected = (ids[place] * 20)[: 4 + place]
            assert answer.token_ids == expected


def test_options_have_an_effect_or_are_refused(pipe, reference):
    text = prompts()[0]
    with pytest.raises(ConfigError, match=r"GenerationConfig\.n"):
        pipe([text], gen_config=GenerationConfig(n=2))
    with pytest.raises(ConfigError, match="output_logits"):
        list(pipe.stream_infer([text], gen_config=GenerationConfig(output_logits="all")))
    with pytest.raises(ConfigError, match=r"^temperature: .*GenerationConfig"):
        pipe([text], temperature=0.5)
    with pytest.raises(ConfigError, match="2 of them for 1 prompts"):
        pipe([text], gen_config=[GREEDY, GREEDY])
    with pytest.raises(ValueError, match="2 sessions"):
        list(pipe.stream_infer([text], sessions=[pipe.session(), pipe.session()]))
    forbidden = pipe(text, gen_config=replace(GREEDY, bad_words=["several words of it"]))
    assert forbidden.finish_reason == "error"
    assert "bad_words: 'several words of it'" in forbidden.error_message
    assert "adapter_name: the engine has no adapter 'x'" in pipe(text, adapter_name="x").error_message
    plain = pipe(text, gen_config=GREEDY, do_preprocess=False)
    assert plain.token_ids == reference("qwen3-moe")[0]
    penalized = pipe(text, gen_config=replace(GREEDY, repetition_penalty=5.0), do_preprocess=False)
    assert penalized.token_ids != plain.token_ids
    stop = plain.text[5:12]
    stopped = pipe(text, gen_config=replace(GREEDY, stop_words=[stop]), do_preprocess=False)
    assert (stopped.text, stopped.finish_reason) == (plain.text[: plain.text.index(stop)], "stop")


def test_a_second_pipeline_is_refused_and_the_first_goes_on(pipe, checkpoint):
    """It would write to the same load report, and the end of the one would take the plug from the other."""
    expected = pipe(prompts()[0], gen_config=GREEDY, do_preprocess=False).token_ids
    with pytest.raises(ConfigError, match="has a pipeline already: close it first"):
        epbackend.pipeline(str(checkpoint("qwen3-moe")), CONFIG)
    assert pipe(prompts()[0], gen_config=GREEDY, do_preprocess=False).token_ids == expected


def test_a_response_format_that_takes_too_long_is_refused_alone(pipe, monkeypatch):
    """The ranks would compile it within a step, and answer nobody meanwhile."""
    long, short = (
        GenerationConfig(max_new_tokens=3, response_format={"type": "regex_schema", "regex_schema": text})
        for text in ("a?" * 400, "[0-9]{3}")
    )
    with monkeypatch.context() as hurry:
        hurry.setattr(response_formats, "DEADLINE_S", 0.05)
        refused = pipe(prompts()[0], gen_config=long, do_preprocess=False)
    assert (refused.finish_reason, refused.token_ids) == ("error", [])
    assert "response_format: is not compiled within 0.05 s" in refused.error_message
    # While the thread that was given up still compiles.
    assert pipe(prompts()[0], gen_config=short, do_preprocess=False).text.isdigit()


def test_compiled_response_formats_are_forgotten(pipe, checkpoint):
    manager = GuidedDecodingManager(AutoTokenizer.from_pretrained(checkpoint("qwen3-moe")), None)
    assert manager.compiler.cache_limit_bytes == requests.FORMATS_BYTES
