"""Requests on their way through LMDeploy: checked before the engine, none ends it, each option has its effect."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any
from weakref import WeakKeyDictionary

from epbackend.engines.lmdeploy.patching import Patch, patch
from epbackend.engines.lmdeploy.requests.checks import (
    ALMOST_ZERO,
    BadRequestError,
    check_adapter,
    check_generation,
    is_disaggregated,
    is_long,
    vocabulary_size,
    within_vocabulary,
)
from epbackend.engines.lmdeploy.state import active

logger = logging.getLogger("lmdeploy")

_ASYNC_ENGINE = "lmdeploy.serve.core.async_engine:AsyncEngine"
_SAMPLING = "lmdeploy.pytorch.strategies.ar"


@patch(
    f"{_ASYNC_ENGINE}.__init__",
    why="the patches of its server are applied when it is built in a process that has loaded the server",
    when="always",
    fingerprint="02b7cdffc525",
)
def server_is_patched(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        patch_loaded_server()

    return init


class _LazyProcessor:
    """Stands for transformers' AutoProcessor, which is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        from transformers.models.auto.processing_auto import AutoProcessor

        return getattr(AutoProcessor, name)


@patch(
    "lmdeploy.model:HFChatTemplate.__init__",
    why="it imports transformers' processors, for two seconds, where the tokenizer has a chat template of its own too",
    when="always",
    fingerprint="33b0c803e1a8",
)
def processors_only_where_asked(original: Callable) -> Callable:
    import transformers

    # Its names are imported when they are first asked for.
    names = vars(transformers)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "AutoProcessor" in names:
            original(self, *args, **kwargs)
            return
        names["AutoProcessor"] = _LazyProcessor()
        try:
            original(self, *args, **kwargs)
        finally:
            names.pop("AutoProcessor", None)

    return init


def patch_loaded_server() -> None:
    """Applies the patches of LMDeploy's server where it is loaded; importing it for them would cost a second."""
    if "lmdeploy.serve.openai.api_server" in sys.modules:
        from epbackend.engines.lmdeploy.patches import server

        active().patches.apply_once(server.PATCHES)


@patch(
    f"{_ASYNC_ENGINE}.preprocess",
    why="empty prompts, token ids that the model does not have and numbers without a meaning reach the engine",
    when="always",
    fingerprint="d588f51ecea7",
)
def requests_are_checked(original: Callable) -> Callable:
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    from epbackend.engines.lmdeploy.requests.response_formats import FormatTrials

    trials: WeakKeyDictionary[Any, FormatTrials] = WeakKeyDictionary()

    async def check_response_format(engine: Any, wanted: Any) -> None:
        if wanted is not None:
            if engine not in trials:
                trials[engine] = FormatTrials(engine.tokenizer.model.model, vocabulary_size(engine.hf_cfg))
            await trials[engine].check(wanted)

    def check_wishes(gen_config: Any, tokenizer: Any) -> None:
        """What LMDeploy takes from a GenerationConfig without a word, and cannot do."""
        if gen_config is None:
            return
        for word in gen_config.bad_words or ():
            if len(tokenizer.encode(word, add_bos=False)) != 1:
                raise BadRequestError(
                    "bad_words",
                    f"{word!r} is not one token, and only tokens can be forbidden; use bad_token_ids",
                )

    @functools.wraps(original)
    async def preprocess(
        self: Any, messages: Any, session_id: Any, gen_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            check_wishes(gen_config, self.tokenizer)
            await check_response_format(self, getattr(gen_config, "response_format", None))
            check_adapter(kwargs.get("adapter_name"), getattr(self.backend_config, "adapters", None) or ())
        except ValueError as error:
            self.session_mgr.remove(session_id)
            raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
        prepared = await original(self, messages, session_id, gen_config, *args, **kwargs)
        generation, ids = prepared.gen_config, prepared.inputs["input_ids"]
        vocabulary = vocabulary_size(self.hf_cfg)
        try:
            # The ids of images may lie outside the vocabulary.
            check_generation(
                ids,
                generation,
                None if prepared.inputs.get("multimodal") else vocabulary,
                disaggregated=is_disaggregated(self.backend_config),
            )
        except BadRequestError as error:
            self.session_mgr.remove(prepared.session)
            raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from error
        generation.top_k = within_vocabulary(generation.top_k, vocabulary)
        if generation.temperature < ALMOST_ZERO:
            generation.temperature = 0.0
        return prepared

    return preprocess


@patch(
    "lmdeploy.serve.processors.multimodal:MultimodalProcessor._get_text_prompt_input",
    why="a server answers nobody, probes of its health included, while it tokenizes a long prompt",
    when="always",
    fingerprint="9ad2988184c5",
)
def long_prompts_off_the_loop(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.workers.ring import off_loop

    @functools.wraps(original)
    async def get_text_prompt_input(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_long([prompt, *args, kwargs]):  # a chat template writes out tools and its options too
            return await original(self, prompt, *args, **kwargs)
        # It awaits nothing itself; most of the time is the tokenizer's, without the interpreter lock.
        return await off_loop(lambda: asyncio.run(original(self, prompt, *args, **kwargs)))

    return get_text_prompt_input


@patch(
    f"{_ASYNC_ENGINE}._determine_gen_config",
    why="without sampling it drops the repetition penalty",
    when="always",
    fingerprint="9bd8479150cc",
)
def penalty_without_sampling(original: Callable) -> Callable:
    @functools.wraps(original)
    def determine_gen_config(self: Any, input_ids: list[int], gen_config: Any = None) -> Any:
        determined = original(self, input_ids, gen_config)
        if gen_config is not None:
            determined.repetition_penalty = gen_config.repetition_penalty
        return determined

    return determine_gen_config


@patch(
    "lmdeploy.messages:GenerationConfig.convert_stop_bad_words_to_ids",
    why="it knows stop words of one token only, and takes every token that contains one for it",
    when="always",
    fingerprint="fe9ad6e3fbff",
)
def stop_words_are_texts(original: Callable) -> Callable:
    @functools.wraps(original)
    def convert_stop_bad_words_to_ids(self: Any, tokenizer: Any) -> None:
        # Special tokens have no text in an answer; all other words are looked for in it.
        special = tokenizer.model.model.get_added_vocab()
        words = self.stop_words or []
        self.stop_words = None
        self.stop_token_ids = [
            *(self.stop_token_ids or []),
            *(special[word] for word in words if word in special),
        ]
        original(self, tokenizer)
        self.stop_words = [word for word in words if word not in special]

    return convert_stop_bad_words_to_ids


@patch(
    f"{_ASYNC_ENGINE}.generate",
    why="it does not look for stop words in the text",
    when="always",
    fingerprint="3b37d7709dd7",
)
def answers_stop_at_texts(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.requests.stop_strings import until_stop

    @functools.wraps(original)
    def generate(self: Any, request: Any, stream_response: bool = True) -> AsyncIterator[Any]:
        parts = original(self, request, stream_response)
        generation = getattr(request, "gen_config", None)
        if generation is None or not generation.stop_words:
            return parts
        return until_stop(
            parts,
            generation.stop_words,
            generation.include_stop_str_in_output,
            generation.min_new_tokens or 0,
        )

    return generate


@patch(
    "lmdeploy.pytorch.engine.engine_instance:EngineInstance.async_stream_infer",
    why="what it hands to the engine, by whatever way it came, can end the engine or a rank; "
    "processors have to be sent to the ranks; a failed one is told by its last token",
    when="always",
    fingerprint="f5074484de05",
)
def engine_inputs_are_checked(original: Callable) -> Callable:
    from lmdeploy.messages import EngineOutput, GenerationConfig, ResponseType

    from epbackend.engines.lmdeploy.requests.logits_processors import NO_TOKEN, for_ranks

    @functools.wraps(original)
    async def async_stream_infer(
        self: Any, session_id: int, input_ids: list[int], gen_config: Any = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        generation = gen_config or GenerationConfig()
        vocabulary = self.engine.model_config.vocab_size
        try:
            check_generation(
                input_ids,
                generation,
                None if kwargs.get("multimodal") else vocabulary,
                disaggregated=is_disaggregated(self.engine.engine_config),
            )
            generation.logits_processors = for_ranks(generation.logits_processors, len(input_ids))
        except BadRequestError as error:
            logger.error("session %s is refused: %s", session_id, error)
            yield EngineOutput(ResponseType.NOT_SUPPORTED, [])
            return
        generation.top_k = within_vocabulary(generation.top_k, vocabulary)
        parts = original(self, session_id, input_ids, gen_config=generation, **kwargs)
        try:
            async for part in parts:
                if part.token_ids and part.token_ids[-1] == NO_TOKEN:
                    part = EngineOutput(ResponseType.INTERNAL_ENGINE_ERROR, [])
                yield part
        finally:
            await parts.aclose()

    return async_stream_infer


@patch(
    "lmdeploy.pytorch.engine.engine:Engine._on_add_message",
    why="an error in one message ends the engine's loop, and with it all other requests",
    when="always",
    fingerprint="7030c7a2a114",
)
def messages_fail_alone(original: Callable) -> Callable:
    from lmdeploy.messages import ResponseType

    @functools.wraps(original)
    def on_add_message(self: Any, reqs: list[Any], **kwargs: Any) -> None:
        for req in reqs:
            try:
                original(self, [req], **kwargs)
            except Exception:
                session_id = req.data["session_id"]
                logger.exception("session %s: its message cannot be added; it ends with an error", session_id)
                self.scheduler.end_session(session_id)
                self._response(req.resp, ResponseType.INTERNAL_ENGINE_ERROR)

    return on_add_message


@patch(
    "lmdeploy.pytorch.engine.engine:Engine._add_message",
    why="a prompt that fills its session (get_ppl takes it) is to be answered with no token; the ranks add it to those "
    "that they decode all the same, and end by it in the next step",
    when="always",
    fingerprint="144bcff87da7",
)
def full_sessions_get_a_token(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_message(self: Any, reqs: list[Any]) -> None:
        wanted = [req.data["sampling_param"].max_new_tokens for req in reqs]
        original(self, reqs)
        for req, tokens in zip(reqs, wanted, strict=True):
            options = req.data["sampling_param"]
            if tokens > 0 and options.max_new_tokens < 0:  # images became more tokens than the prompt had
                raise ValueError("the prompt has more tokens than a session may have")
            if tokens > 0:
                options.max_new_tokens = max(1, options.max_new_tokens)  # the last token needs no cache

    return add_message


@patch(
    "lmdeploy.pytorch.paging.prefill_scheduler:_PrefillScheduler.schedule",
    why="a prompt whose log probabilities are read ends the engine when one that is to be answered is in its batch",
    when="always",
    fingerprint="56943db1b680",
)
def prompts_are_read_apart(original: Callable) -> Callable:
    """Its ranks take a batch with one such prompt for a batch of them, and keep nothing to decode from."""

    @functools.wraps(original)
    def schedule(self: Any, *, waiting: list[Any], **kwargs: Any) -> list[Any]:
        read = [seq for seq in waiting if seq.sampling_param.logprob_start_len >= 0]
        answered = [seq for seq in waiting if seq.sampling_param.logprob_start_len < 0]
        # The kind of who waits longest is first; where none of it can begin, the other may.
        first, second = (read, answered) if waiting[:1] == read[:1] else (answered, read)
        return original(self, waiting=first, **kwargs) or original(self, waiting=second, **kwargs)

    return schedule


FORMATS_BYTES = 256 << 20
"""Of compiled response formats, which a process keeps for those who ask for them again."""


@patch(
    "xgrammar:GrammarCompiler.__init__",
    why="every response format that was ever asked for stays in the memory of each rank",
    when="always",
)
def formats_are_forgotten(original: Callable) -> Callable:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{"cache_limit_bytes": FORMATS_BYTES} | kwargs)

    return init


@patch(
    "lmdeploy.pytorch.engine.logits_process:_apply_custom_logits_processors",
    why="an error in one processor ends the rank; and it shows processors the padding of shorter sequences",
    when="always",
    fingerprint="3c669a624748",
)
def processors_fail_alone(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.requests.logits_processors import apply_processors

    return apply_processors


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:BaseModelAgent._step_postprocess_with_output",
    why="the engine has to be told which sequences' processors failed",
    when="always",
    fingerprint="c6e081e47f42",
)
def failed_processors_are_told(original: Callable) -> Callable:
    from epbackend.engines.lmdeploy.requests.logits_processors import end_failed

    @functools.wraps(original)
    async def step_postprocess_with_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        results = await original(self, *args, **kwargs)
        end_failed(results[-1])
        return results

    return step_postprocess_with_output


def _with_no_token(original: Callable, place: int) -> Callable:
    """The function with NO_TOKEN for its argument at `place`, the id that it pads with."""
    from epbackend.engines.lmdeploy.requests.logits_processors import NO_TOKEN

    @functools.wraps(original)
    def padded(*args: Any) -> Any:
        return original(*args[:place], NO_TOKEN, *args[place + 1 :])

    return padded


_PADDING = "processors cannot tell its padding from a sequence's own tokens"

PATCHES = (
    server_is_patched,
    processors_only_where_asked,
    requests_are_checked,
    long_prompts_off_the_loop,
    penalty_without_sampling,
    stop_words_are_texts,
    answers_stop_at_texts,
    engine_inputs_are_checked,
    messages_fail_alone,
    full_sessions_get_a_token,
    prompts_are_read_apart,
    formats_are_forgotten,
    processors_fail_alone,
    failed_processors_are_told,
    Patch(
        "sequences-padded-with-no-token",
        f"{_SAMPLING}.sampling:_gather_all_ids",
        _PADDING,
        "always",
        lambda original: _with_no_token(original, 0),
        "1e7ee1735a3e",
    ),
    Patch(
        "merged-sequences-padded-with-no-token",
        f"{_SAMPLING}.step_inputs:merge_sampling_delta",
        _PADDING,
        "always",
        lambda original: _with_no_token(original, 2),
        "de1cbd8b241a",
    ),
)
