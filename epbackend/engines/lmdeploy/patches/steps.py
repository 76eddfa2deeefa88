"""Behind each step of the engine: what the experts have done is sent on its way, and a step that never ends is told of.

This runs once a step in the serving thread, so all of it together must stay far below a hundredth of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lmdeploy.pytorch.distributed import get_dist_manager

from epbackend.engines.lmdeploy.patching import patch
from epbackend.engines.lmdeploy.plug import active


@patch(
    "lmdeploy.pytorch.engine.model_agent.agent:model_forward",
    why="layers in a captured graph neither report what they did nor fail in time; here a step is over either way",
    when="always",
    fingerprint="590e0f33e595",
)
def steps_are_counted(original: Callable) -> Callable:
    @functools.wraps(original)
    def model_forward(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
        plug = active()
        # A lost rank would be waited for without end, in graphs too. Not in the interpreter, whose device is cuda as
        # well, and where nothing runs behind the host's back.
        watched = plug.device == "cuda" and plug.config.ep_size > 1 and torch.cuda.is_initialized()
        with plug.context.one_mark() if watched else nullcontext():
            output = original(*args, stream=stream, **kwargs)
        # LMDeploy is in the step's stream already; going there once more would cost more than what is done there.
        there = stream is None or stream == torch.cuda.current_stream()
        with nullcontext() if there else torch.cuda.stream(stream):
            plug.load_writer.step()
            if watched:
                group = get_dist_manager().current_context().ep_gpu_group
                plug.context.watch("a step of the engine", group, plug.config.timeout_s)
        return output

    return model_forward
