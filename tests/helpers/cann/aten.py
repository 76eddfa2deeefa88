"""Plain torch operators on emulated NPU tensors: computed by the CPU, over the same bytes.

Allocations, views, copies of bytes and everything of `npu::` stay with torch_npu. The mode also notes where the host
waits for the device, which a decode step should not do: operators that read a result or a shape, and the calls of the
runtime that synchronize.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.cann import atb
from tests.helpers.cann.handles import RefusedError, over_bytes
from tests.helpers.cann.registry import in_short, log, note, require

ALLOCATE = {"aten::empty.memory_format", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
NATIVE = {
    *ALLOCATE,
    "aten::resize_",
    "aten::set_.source_Storage",
    "aten::_local_scalar_dense",
    "aten::record_stream",
    "aten::is_pinned",
    "aten::_pin_memory",
}
WAIT_FOR_THE_DEVICE = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::unique2",
    "aten::repeat_interleave.Tensor",
    "aten::equal",
}
"""Operators whose result, or its shape, is needed on the host; copies to the host are known by their results."""

CALLERS = ("epbackend", "lmdeploy", "dlinfer")
"""Packages on whose behalf something may wait."""

WAIT = "host waits"
"""Begins a line of the log that tells what waited, and on whose behalf."""

host_waits: list[str] = []
"""What has made the host wait for the device so far."""

_kept_alive: list[Any] = []
_here = threading.local()  # .in_aten: this thread is inside an operator, which is noted itself


def compute_on_cpu() -> None:
    """Compute in this thread from now on, and in all that are started; torch's modes are of one thread each."""
    AtenOnCpu().__enter__()
    bootstrap = threading.Thread._bootstrap_inner

    def bootstrap_in_mode(thread: threading.Thread) -> None:
        with AtenOnCpu():
            bootstrap(thread)

    threading.Thread._bootstrap_inner = bootstrap_in_mode


def watch(runtime: ctypes.CDLL) -> None:
    """Note the synchronizing calls of libascendcl too."""

    def waited(call: bytes) -> None:
        frame = sys._getframe().f_back
        if frame is not None and not getattr(_here, "in_aten", False):  # threads of C++ have no frame
            _note_wait(call.decode(), frame)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(waited)
    _kept_alive.append(callback)
    runtime.emulation_tell_waits(callback)


class AtenOnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.name()
        if _is_made_of_others(operator):  # under inference_mode such an operator arrives whole
            with self:
                return operator.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if operator.namespace == "c10d":
            note(name, {"": _shapes(args)})
        if operator.namespace == "atb":
            return _atb(operator, args, kwargs)
        if operator.namespace != "aten" or not any(map(_is_npu, leaves)):
            return operator(*args, **kwargs)
        _here.in_aten = True
        try:
            result = _run(operator, args, kwargs)
        finally:
            _here.in_aten = False
        if _waits(operator, args, kwargs, result):
            _note_wait(name, sys._getframe().f_back)
        return result


def _run(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = operator.name()
    if operator.is_view or name in NATIVE or _moves_bytes(name, args):
        result = operator(*args, **kwargs)
        return _poisoned(result) if name in ALLOCATE else result
    return _on_cpu(operator, args, kwargs)


@cache
def _is_made_of_others(operator: Any) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = operator.name()
    return has(name, "CompositeImplicitAutograd") and not has(name, "PrivateUse1")


def _atb(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator that writes into its arguments; refused like any other of CANN."""
    name = operator.name()
    if name not in atb.OPERATORS:
        raise RuntimeError(f"[emulated CANN] {name} is not emulated")
    names = [argument.name for argument in operator._schema.arguments]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    note(name, {name: in_short(value) for name, value in arguments.items()})
    try:
        for place in atb.ON_THE_HOST & arguments.keys():
            require(not _is_npu(arguments[place]), f"{place} must be on the host")
        lowered = {
            name: host_view(value) if isinstance(value, Tensor) and _is_npu(value) else value
            for name, value in arguments.items()
        }
        return atb.OPERATORS[name](**lowered)
    except RefusedError as error:
        raise RuntimeError(f"{name}: {error}") from None


def _shapes(args: tuple) -> list[str]:
    """The rows that a collective moves, in short."""
    return [in_short(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and _is_npu(leaf)]


def _is_npu(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type == "npu"
    return isinstance(value, torch.device | str) and str(value).startswith("npu")


def _moves_bytes(name: str, args: tuple) -> bool:
    if name != "aten::copy_":
        return False
    target, source = args[0], args[1]
    return target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()


def _waits(operator: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> bool:
    """Whether the host has to wait before it can go on with the result."""
    name = operator.name()
    if name.startswith("aten::index."):  # by a mask: the shape depends on its values
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if name in WAIT_FOR_THE_DEVICE:
        return True
    on_host = any(isinstance(leaf, Tensor) and not _is_npu(leaf) for leaf in tree_leaves(result))
    reads = any(isinstance(leaf, Tensor) and _is_npu(leaf) for leaf in tree_leaves((args, kwargs)))
    if not (on_host and reads):
        return False
    arguments = dict(zip((each.name for each in operator._schema.arguments), args, strict=False)) | kwargs
    in_passing = arguments.get("non_blocking", False)
    return not (in_passing and (name != "aten::copy_" or args[0].is_pinned()))


def _note_wait(name: str, frame: FrameType | None) -> None:
    host_waits.append(name)
    log(WAIT, f"{name}, {_caller(frame)}")


def _caller(frame: FrameType | None) -> str:
    """The innermost function on whose behalf something waits: module and name."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in CALLERS:
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "other code"


def _on_cpu(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run on CPU tensors that share the bytes; results become NPU tensors, in-place results the tensors they were."""
    lowered: dict[int, tuple[Tensor, Tensor]] = {}
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if _is_npu(leaf)]
    places = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    places += [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.index is not None]
    # A thread's current device is the first one, whatever that of the thread that started it.
    place = next(iter(places), torch.device("npu", torch.npu.current_device()))
    to_host = "device" in kwargs and not _is_npu(kwargs["device"])

    def lower(value: Any) -> Any:
        if not _is_npu(value):
            return value
        if not isinstance(value, Tensor):
            return torch.device("cpu")
        if id(value) not in lowered:
            lowered[id(value)] = value, host_view(value)
        return lowered[id(value)][1]

    result = operator(*tree_map(lower, args), **tree_map(lower, kwargs))
    originals = {id(view): tensor for tensor, view in lowered.values()}

    def lift(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_host:
            return value
        if id(value) in originals:
            return originals[id(value)]
        lifted = torch.empty(value.shape, dtype=value.dtype, device=place)
        host_view(lifted).copy_(value)
        return lifted

    return tree_map(lift, result)


def host_view(tensor: Tensor) -> Tensor:
    """A CPU tensor over the bytes of an NPU tensor."""
    address = tensor.data_ptr() - tensor.storage_offset() * tensor.element_size()
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    shape, strides = list(tensor.shape), list(tensor.stride())
    return over_bytes(address, shape, strides, tensor.storage_offset(), tensor.dtype, elements)


def _poisoned(tensor: Tensor) -> Tensor:
    """What a real allocation holds is anybody's guess: here it is NaN, or the type's -1."""
    if tensor.dtype != torch.bool:
        ctypes.memset(tensor.data_ptr(), 0xFF, tensor.untyped_storage().nbytes())
    return tensor
