"""Behind each step of the engine: what the experts have done is written down, and a step that never ends is told of."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        output = original(*args, stream=stream, **kwargs)
        with torch.cuda.stream(stream or torch.cuda.current_stream()):
            active().load_writer.step()
            _watch_step()
        return output

    return model_forward


def _watch_step() -> None:
    """Mark the end of a step on a GPU, where a lost rank would be waited for without end, in graphs too."""
    config = active().config
    # Not in the interpreter, where nothing runs behind the host's back.
    if active().device == "cuda" and config.ep_size > 1 and torch.cuda.is_available():
        group = get_dist_manager().current_context().ep_gpu_group
        active().context.watch("a step of the engine", group, config.timeout_s)
