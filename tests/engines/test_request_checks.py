"""What a request may contain, stop strings, penalties and tokens' texts: each by itself, without an engine."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lmdeploy import GenerationConfig, Pipeline
from lmdeploy.model import BaseChatTemplate
from lmdeploy.serve.core.async_engine import AsyncEngine
from lmdeploy.serve.openai.protocol import Function, Tool
from lmdeploy.serve.processors.multimodal import MultimodalProcessor
from lmdeploy.tokenizer import Tokenizer

from epbackend.engines.lmdeploy.patches.requests import long_prompts_off_the_loop, messages_fail_alone
from epbackend.engines.lmdeploy.patches.server import check_session
from epbackend.engines.lmdeploy.pipelines import ExpertParallelPipeline
from epbackend.engines.lmdeploy.requests import response_formats
from epbackend.engines.lmdeploy.requests.checks import (
    CALL_ARGUMENTS,
    DISAGGREGATION,
    LONG,
    RANGES,
    BadRequestError,
    check_body,
    check_call,
    check_format,
    check_generation,
    is_long,
)
from epbackend.engines.lmdeploy.requests.logits_processors import (
    NO_TOKEN,
    LogitBias,
    OutputPenalties,
    apply_processors,
    end_failed,
    for_ranks,
    logit_bias,
)
from epbackend.engines.lmdeploy.requests.stop_strings import until_stop
from epbackend.errors import ConfigError, EPError
from epbackend.models import resolve

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    *RANGES,
    "prompt",
    "messages",
    "stop",
    "response_format",
    "max_tokens",
    "logprobs",
    "suffix",
    "guided_json",
    "tools",
    "chat_template_kwargs",
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON)
def test_any_json_is_accepted_or_refused_by_the_name_of_a_field(body):
    refused = None
    try:
        check_body(body, None, session_len=100, token_length=3)
    except BadRequestError as error:
        refused = error
    if refused:
        assert refused.field.split(".")[0] in {*FIELDS, "body"}
        assert len(str(refused)) < 400
    else:
        numbers = {name: value for name, value in body.items() if name in RANGES and value is not None}
        assert all(math.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a" * 301}, "prompt"),
        ({"prompt": ["a", "b" * 301]}, "prompt"),
        ({"messages": [{"role": "user", "content": "a" * 301}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 301}]}]},
            "messages.0.content.0.text",
        ),
    ],
)
def test_a_text_that_no_session_can_hold_is_refused_by_its_length(body, field):
    shorter = json.loads(json.dumps(body).replace("a" * 301, "a" * 300).replace("b" * 301, "b"))
    check_body(shorter, None, session_len=100, token_length=3)
    with pytest.raises(BadRequestError, match=rf"^{field}: must have at most 300 characters .* not 301$"):
        check_body(body, None, session_len=100, token_length=3)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"stop": ["a"] * 65}, "stop: must be at most 64 texts, not 65"),
        ({"stop": "a" * 1001}, "stop: must have at most 1000 characters, not 1001"),
        ({"tools": [{"function": {"parameters": {"a": ["b" * 301]}}}]}, "tools: must have at most 300 "),
        ({"tools": [{"function": {"parameters": {"\ud800": 1}}}]}, "tools: must be Unicode"),
        ({"input": ["a", {"content": [{"text": "b" * 301}]}]}, "input: must have at most 300 "),
        ({"messages": [{"role": "user", "content": "a"}] * 101}, "messages: must be at most 100 "),
        (
            {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
            "chat_template_kwargs.chat_template: ",
        ),
    ],
)
def test_what_would_hold_the_event_loop_is_refused(body, said):
    with pytest.raises(BadRequestError) as refused:
        check_body(body, None, session_len=100, token_length=3)
    assert str(refused.value).startswith(said)


def test_a_session_of_another_request_is_refused():
    sessions = SimpleNamespace(user_session_id_map={5: 0})
    for body in (
        {"session_id": 6},
        {"session_id": -1},
        {"session_id": None},
        {"session_id": "5"},
        {},
        [],
        None,
    ):
        check_session(body, sessions)
    with pytest.raises(BadRequestError, match=r"^session_id: 5 has a request already"):
        check_session({"session_id": 5}, sessions)


def test_a_schema_that_takes_minutes_to_read_is_refused():
    """A grammar library's time grows with the third power of the depth, and nothing else is served meanwhile."""
    schema: dict = {"type": "string"}
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    check_format(form)
    with pytest.raises(BadRequestError, match=r"^response_format: .*64 levels"):
        check_format({"type": "json_schema", "json_schema": form})
    with pytest.raises(BadRequestError, match=r"^response_format: must be a dict"):
        check_format("json")


def test_pictures_are_no_text():
    picture = "data:image/png;base64," + "A" * 1000
    for body in (
        {"prompt": "a", "image_data": picture},
        {"prompt": "a", "image_data": [{"url": picture}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}]},
    ):
        check_body(body, None, session_len=100, token_length=3)


def test_tools_and_templates_count_for_the_length_of_a_prompt():
    tool = Tool(function=Function(name="f", parameters={"a": ["b" * LONG]}))
    for value in (tool, {"tools": [tool]}, [{"role": "user", "content": ""}] * LONG, "a" * LONG):
        assert is_long([value])
    assert not is_long(["a", {"b": Tool(function=Function(name="f"))}, list(range(LONG))])
    deep: list = []
    for _ in range(10**5):
        deep = [deep]
    assert not is_long(deep)


def test_a_long_prompt_is_tokenized_beside_the_event_loop():
    """Others are answered meanwhile."""
    tokenizer = Tokenizer(str(resolve("tiny-qwen3-moe")))
    text = "the quick brown fox " * (LONG // 4)
    processor, served = MultimodalProcessor(tokenizer, BaseChatTemplate()), 0

    prompt_input = long_prompts_off_the_loop.build(MultimodalProcessor._get_text_prompt_input)

    async def serve() -> dict:
        nonlocal served
        found = asyncio.create_task(prompt_input(processor, text, do_preprocess=False, adapter_name=None))
        while not found.done():
            await asyncio.sleep(0.001)
            served += 1
        return found.result()

    assert asyncio.run(serve())["input_ids"] == tokenizer.encode(text)
    assert served > 2


@pytest.mark.parametrize(
    "generation",
    [
        GenerationConfig(stop_token_ids=[512]),
        GenerationConfig(bad_token_ids=[-1]),
        GenerationConfig(stop_token_ids=[2**70]),
        GenerationConfig(stop_words=[""]),
        GenerationConfig(repetition_penalty=float("nan")),
        GenerationConfig(repetition_ngram_size=10**30, repetition_ngram_threshold=1),
        GenerationConfig(logprobs=513),
        GenerationConfig(top_k=10**30),
        # Values of a wrong type: from Python, no schema converts them.
        GenerationConfig(top_k=5.0),
        GenerationConfig(logprobs=2.0),
        GenerationConfig(min_new_tokens=5.0),
        GenerationConfig(random_seed=1.5),
        GenerationConfig(random_seed=True),
        GenerationConfig(logprobs=1, logprob_start_len=0.5),
        # The engine is not disaggregated.
        GenerationConfig(preserve_cache=True),
        GenerationConfig(with_cache=True),
        GenerationConfig(migration_request={"protocol": 1}),
    ],
)
def test_what_would_end_the_engine_is_refused(generation):
    check_generation([1, 511], GenerationConfig(), 512)
    with pytest.raises(BadRequestError):
        check_generation([1, 511], generation, 512)


MIGRATION = {
    "protocol": 1,
    "remote_engine_id": "a",
    "remote_session_id": 1,
    "remote_token_id": 1,
    "remote_block_ids": [1],
}


@pytest.mark.parametrize("field", DISAGGREGATION)
def test_a_disaggregated_engine_has_its_own_fields(field):
    value = MIGRATION if field == "migration_request" else True
    for check in (
        lambda **role: check_body({field: value}, {"prompt"}, 100, 3, **role),
        lambda **role: check_generation([1], GenerationConfig(**{field: value}), 512, **role),
    ):
        check(disaggregated=True)
        with pytest.raises(BadRequestError, match=rf"^{field}: needs a disaggregated engine"):
            check()
    check_body({field: None}, {"prompt"}, 100, 3)
    check_body({field: False}, {"prompt"}, 100, 3)


@pytest.mark.parametrize("value", [1, {"a": 1}, MIGRATION | {"remote_block_ids": "a"}])
def test_a_disaggregated_engine_refuses_what_is_no_migration(value):
    with pytest.raises(BadRequestError, match=r"^migration_request: is not one of LMDeploy's"):
        check_body({"migration_request": value}, {"prompt"}, 100, 3, disaggregated=True)


@pytest.mark.parametrize("ids", [[], [512], [-1], [2**70], [0.5], ["a"], [None]])
def test_prompts_are_ids_of_the_vocabulary(ids):
    with pytest.raises(BadRequestError, match="prompt"):
        check_generation(ids, GenerationConfig(), 512)


@pytest.mark.parametrize(
    "option",
    [
        {"n": 2},
        {"output_logits": "all"},
        {"output_last_hidden_state": "all"},
        {"return_ppl": True},
        {"return_routed_experts": True},
    ],
)
def test_options_that_a_pipeline_would_ignore_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        check_call(1, GenerationConfig(**option), (), experts_told=False)
    check_call(1, GenerationConfig(return_routed_experts=True), CALL_ARGUMENTS, experts_told=True)


def test_a_pipelines_call_has_the_arguments_of_lmdeploys():
    ways = (Pipeline.stream_infer, AsyncEngine.preprocess)
    known = {name for way in ways for name in inspect.signature(way).parameters}
    assert known - CALL_ARGUMENTS == {
        "self",
        "prompts",
        "sessions",
        "gen_config",
        "kwargs",
        "messages",  # what becomes of prompts and sessions
        "session_id",
        "input_ids",
    }


def test_a_closed_pipeline_says_so():
    pipe = ExpertParallelPipeline.__new__(ExpertParallelPipeline)  # starts no engine
    pipe._closed = True
    for call in (lambda: pipe(["a"]), lambda: list(pipe.stream_infer("a"))):
        with pytest.raises(EPError, match="closed"):
            call()


@dataclass
class Part:
    """As much of LMDeploy's GenOut as stop strings touch."""

    response: str
    generate_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list | None = None


def _stopped(texts, stops, *, keep_stop=False, min_new_tokens=0):
    """The parts that `until_stop` makes of texts, and whether it closed what it read."""
    closed = []

    async def parts():
        try:
            for place, text in enumerate(texts):
                yield Part(text, place + 1, token_ids=[place])
            yield Part("", len(texts), "length")
        finally:
            closed.append(True)

    async def collect():
        return [part async for part in until_stop(parts(), stops, keep_stop, min_new_tokens)]

    return asyncio.run(collect()), bool(closed)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_an_answer_ends_where_its_first_stop_string_begins(texts, stops, keep_stop):
    """Beside a search letter by letter in the whole text."""
    whole = "".join(texts)
    end = next((end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stops))), None)
    expected = whole
    if end is not None:
        # A stop string is found when a part has come: the one that ends first, within that part the same.
        longest = max((stop for stop in stops if whole[:end].endswith(stop)), key=len)
        expected = whole[:end] if keep_stop else whole[: end - len(longest)]
    parts, closed = _stopped(texts, stops, keep_stop=keep_stop)
    assert "".join(part.response for part in parts) == expected
    assert parts[-1].finish_reason == ("length" if end is None else "stop")
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert closed


def test_tokens_inside_a_stop_string_are_not_sent_but_counted():
    parts, _ = _stopped(["one", " the", " ye", "ar", " two"], ["the year"])
    assert [(part.response, part.token_ids) for part in parts] == [("one", [0]), (" ", [1])]
    assert parts[-1].generate_token_len == 4


def test_stop_strings_wait_for_the_fewest_tokens():
    parts, _ = _stopped(["a", "b", "a", "b"], ["a"], min_new_tokens=2)
    assert "".join(part.response for part in parts) == "ab"


def test_penalties_count_the_answer_only():
    logits = OutputPenalties(0.5, 0.25, prompt_tokens=2)(torch.tensor([0, 0, 1, 1, 2]), torch.zeros(4))
    assert logits.tolist() == [0.0, -1.0, -0.75, 0.0]


def test_a_bias_is_added_and_its_tokens_are_checked():
    assert logit_bias({"1": 500, "3": -1}, 4)(torch.tensor([0]), torch.zeros(4)).tolist() == [0, 100, 0, -1]
    assert LogitBias(())(torch.tensor([0]), torch.ones(2)).tolist() == [1, 1]
    for key in ("4", "-1", "x", "", "1.5", "٣", "9" * 5000):
        with pytest.raises(BadRequestError, match="logit_bias"):
            logit_bias({key: 1.0}, 4)


def test_any_callable_reaches_the_ranks_and_keeps_its_state():
    calls = []

    def counting(ids, logits):
        calls.append(len(ids))
        return logits + len(calls)

    (sent,) = for_ranks([counting], 3)
    for expected in (1, 2):
        arrived = pickle.loads(pickle.dumps(sent))
        assert arrived(torch.tensor([0]), torch.zeros(1)).item() == expected
    with pytest.raises(BadRequestError, match="logits_processors"):
        for_ranks([(item for item in ())], 3)


def test_a_failing_processor_ends_its_own_sequence():
    @dataclass
    class Output:
        next_token_ids: torch.Tensor
        stopped: torch.Tensor

    seen = []
    ids = torch.tensor([[NO_TOKEN, 5], [6, 7], [8, 9]])
    logits = torch.zeros(3, 2)
    apply_processors(
        [[lambda ids, logits: seen.append(ids.tolist()) or logits + 1], [lambda ids, logits: 1 / 0], None],
        ids,
        logits,
    )
    assert (seen, logits.tolist()) == ([[5]], [[1, 1], [0, 0], [0, 0]])
    tokens = torch.tensor([1, 1, 1])
    output = Output(tokens, torch.zeros(3, dtype=torch.bool))
    end_failed(output)
    end_failed(output)
    assert output.next_token_ids.tolist() == [1, NO_TOKEN, 1]
    assert output.stopped.tolist() == [False, True, False]
    assert tokens.tolist() == [1, 1, 1], "they are the next step's input"


def test_a_message_that_cannot_be_added_ends_its_own_session():
    """What no check foresees: LMDeploy's own callback raises in the engine's loop."""
    added, ended, told = [], [], []

    def add(engine, reqs):
        for req in reqs:
            added.append(1 // req.data["session_id"])

    engine = SimpleNamespace(
        scheduler=SimpleNamespace(end_session=ended.append), _response=lambda *answer: told.append(answer)
    )
    reqs = [SimpleNamespace(data={"session_id": session}, resp=session) for session in (1, 0, 1)]
    messages_fail_alone.build(add)(engine, reqs)
    assert (added, ended) == ([1, 1], [0])
    assert [(resp, kind.name) for resp, kind in told] == [(0, "INTERNAL_ENGINE_ERROR")]


def test_a_response_format_whose_turn_does_not_come_is_refused(monkeypatch):
    """And not let through untried, whichever clock ends first."""
    monkeypatch.setattr(response_formats, "DEADLINE_S", 0.05)
    monkeypatch.setattr(response_formats, "AT_ONCE", 1)
    trials = response_formats.FormatTrials(None, None)
    wanted = {"type": "regex_schema", "regex_schema": "[0-9]{3}"}
    with trials._free:
        with pytest.raises(TimeoutError):
            trials._try(wanted, until=0.0)
        with pytest.raises(BadRequestError, match="try again later"):
            asyncio.run(trials.check(wanted))
