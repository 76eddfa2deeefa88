"""Response formats are compiled as a trial, before the ranks compile them within a step.

Nothing tells beforehand how long the grammar library takes for one: the regex `a?` a thousand times over takes minutes.
The ranks would answer nobody meanwhile, and end after `timeout_s` as if they were stuck. The library lets other threads
of Python run, so a trial is a thread beside the event loop. It cannot be ended: one that is given up goes on, and so
only a few run at a time.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from typing import Any

from lmdeploy._guided_decoding import ensure_response_format_compilable
from lmdeploy.pytorch.engine import guided_process

from epbackend.engines.lmdeploy.requests.checks import BadRequestError, check_format
from epbackend.engines.lmdeploy.workers.ring import off_loop

DEADLINE_S = 5.0
"""For a trial; the ranks take about as long once more."""
AT_ONCE = 2
"""Trials, those that were given up included: a core each."""
OF_LMDEPLOY = (None, "text", "json_object")
"""Types whose grammar is LMDeploy's own, or none."""


class FormatTrials:
    """The trials of one engine's process."""

    def __init__(self, tokenizer: Any, vocabulary: int | None) -> None:
        """`tokenizer` is a Hugging Face tokenizer, and `vocabulary` the number of the model's outputs."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._making, self._compiler = threading.Lock(), None
        self._free = threading.BoundedSemaphore(AT_ONCE)

    async def check(self, wanted: Any) -> None:
        """Returns once the ranks can compile the format in little time.

        Raises:
            BadRequestError: it is none, or was not compiled in time.
        """
        check_format(wanted)
        if wanted.get("type") in OF_LMDEPLOY:
            return
        until = time.monotonic() + DEADLINE_S
        try:
            await asyncio.wait_for(off_loop(functools.partial(self._try, wanted, until)), DEADLINE_S)
        except TimeoutError:
            raise BadRequestError(
                "response_format",
                f"is not compiled within {DEADLINE_S:g} s; write a simpler one, or try again later",
            ) from None
        except ValueError as error:
            raise BadRequestError("response_format", str(error)) from error

    def _try(self, wanted: dict[str, Any], until: float) -> None:
        """Compiles it. Raises TimeoutError where its turn does not come before `until`."""
        if not self._free.acquire(timeout=max(0.0, until - time.monotonic())):
            raise TimeoutError
        try:
            ensure_response_format_compilable(wanted)
            guided_process.compile_response_format(self._ready_compiler(), wanted)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"Unsupported response format: {error}") from error
        finally:
            self._free.release()

    def _ready_compiler(self) -> Any:
        """As the ranks have it, for the same tokens."""
        with self._making:
            if self._compiler is None:
                manager = guided_process.GuidedDecodingManager(self._tokenizer, self._vocabulary)
                self._compiler = manager.compiler
            return self._compiler
