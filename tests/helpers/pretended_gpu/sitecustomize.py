"""What asks torch for a GPU is answered as if there were one, in every process that multiprocessing spawns.

Python imports this file when it starts with this folder in PYTHONPATH: before any code of LMDeploy or of ours, and with
nothing of the process that spawned it. Tensors that are asked for on the GPU lie on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def pretend(replace: Callable[[Any, str, Any], None]) -> None:
    """Replaces attributes of torch by `replace(owner, name, value)`."""
    import torch

    def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, device=None, **kwargs: make(*args, **kwargs)

    hopper = SimpleNamespace(name="pretended H100", major=9, minor=0)
    replace(torch.version, "cuda", "13.0")
    replace(torch.cuda, "is_available", lambda: True)
    replace(torch.cuda, "device_count", lambda: 2)
    replace(torch.cuda, "set_device", lambda device: None)
    replace(torch.cuda, "current_device", lambda: 0)
    replace(torch.cuda, "get_device_properties", lambda device=None: hopper)
    replace(torch.cuda, "get_device_name", lambda device=None: hopper.name)
    replace(torch, "tensor", on_cpu(torch.tensor))
    replace(torch.Tensor, "new_tensor", on_cpu(torch.Tensor.new_tensor))


if any("spawn_main" in word for word in sys.orig_argv):
    pretend(setattr)
