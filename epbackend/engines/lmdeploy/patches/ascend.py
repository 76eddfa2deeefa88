"""LMDeploy's Ascend backend above the dlinfer that can be installed: each patch bridges what that one lacks.

Where dlinfer has the real thing a patch stays out (`only_if`). `devices/dlinfer_package.py` has all that is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from epbackend.engines.lmdeploy.devices import dlinfer_package
from epbackend.engines.lmdeploy.patching import Patch, patch, replaced_by

_KERNELS = "lmdeploy.pytorch.kernels.dlinfer.pagedattention"
_ATTENTION = "epbackend.engines.lmdeploy.devices.ascend_attention"


def _lacking(gap: str) -> Callable[[], bool]:
    return functools.partial(dlinfer_package.lacks, gap)


@patch(
    "lmdeploy.utils:try_import_deeplink",
    why="a dlinfer that fails to import ends the process, and an older one puts code for an older LMDeploy in the "
    "place of its sampling, cache and inputs",
    when="ascend",
    fingerprint="4fede1a761fc",
)
def dlinfer_loaded(original: Callable) -> Callable:
    dlinfer_package.load()

    def try_import_deeplink(device_type: str) -> None:
        if device_type != "ascend":
            original(device_type)

    return try_import_deeplink


@patch(
    "lmdeploy.pytorch.backends.dlinfer.ascend.op_backend:AscendOpsBackend.init",
    why="it imports a check of versions that dlinfer 0.2.7 does not have",
    when="ascend",
    fingerprint="f6f1ba467a50",
    only_if=_lacking("runtime"),
)
def ascend_runtime_unchecked(original: Callable) -> Callable:
    def init() -> None:
        with dlinfer_package.placeholder(dlinfer_package.RUNTIME, ensure_ascend_runtime=lambda: None):
            original()

    return init


prefill_with_lengths = Patch(
    "ascend-prefill",
    f"{_KERNELS}:prefill_attention",
    "dlinfer 0.2.7 has neither its arguments nor prefill of several tokens beside a cache",
    "ascend",
    replaced_by(f"{_ATTENTION}:prefill_attention"),
    "db9ec7ccabe2",
    only_if=_lacking("attention"),
)
decode_with_lengths = Patch(
    "ascend-decode",
    f"{_KERNELS}:paged_token_attention",
    "dlinfer 0.2.7 takes other arguments",
    "ascend",
    replaced_by(f"{_ATTENTION}:paged_token_attention"),
    "6614af2ab41f",
    only_if=_lacking("attention"),
)


@patch(
    "lmdeploy.pytorch.backends.dlinfer.qmodules:linear_w8a8",
    why="dlinfer 0.2.7 takes rows as [1, T, D] alone; MLA has [T, 1, D] for its keys, and [D, D] when it is loaded",
    when="ascend",
    fingerprint="45adb7eb1165",
    only_if=_lacking("static w8a8"),
)
def int8_rows_of_any_shape(original: Callable) -> Callable:
    def linear_w8a8(a: Any, b: Any, rms_scale: Any, *args: Any, **kwargs: Any) -> Any:
        out_TN = original(a.flatten(0, -2)[None], b, rms_scale.flatten()[None], *args, **kwargs)[0]
        return out_TN.view(*a.shape[:-1], -1)

    return linear_w8a8


@patch(
    "torch.cuda:get_device_capability",
    why="LMDeploy makes torch.cuda a name of torch.npu; torch's broadcast asks that for a compute capability, which is "
    "None",
    when="ascend",
)
def npu_has_no_capability(original: Callable) -> Callable:
    def get_device_capability(device: Any = None) -> tuple[int, int]:
        return 0, 0

    return get_device_capability


PATCHES: tuple[Patch, ...] = (
    # First: the targets of the others are found by importing dlinfer.
    dlinfer_loaded,
    ascend_runtime_unchecked,
    prefill_with_lengths,
    decode_with_lengths,
    int8_rows_of_any_shape,
    npu_has_no_capability,
)
