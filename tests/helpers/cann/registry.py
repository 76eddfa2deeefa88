"""The aclnn operators that are emulated: each is two C functions, one that checks and plans and one that runs."""

from __future__ import annotations

import ctypes
import itertools
import os
import traceback
from collections.abc import Callable
from ctypes import POINTER, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.cann.build import table_symbols
from tests.helpers.cann.handles import ARGUMENTS, Handles, RefusedError

REFUSED, FAILED = 161002, 561103
"""ACLNN_ERR_PARAM_INVALID and an inner error, as CANN returns them."""

GARBAGE = 77
"""What integers that no kernel defines are filled with; floats are NaN."""


@dataclass(frozen=True)
class Operator:
    """An emulation, and the C signature of what it stands for: inputs first, then outputs."""

    emulate: Callable[..., None]
    inputs: dict[str, str]
    outputs: dict[str, str]

    @property
    def ctypes(self) -> list[Any]:
        return [ARGUMENTS[code].ctype for code in (*self.inputs.values(), *self.outputs.values())]


OPERATORS: dict[str, Operator] = {}
calls: list[tuple[str, dict[str, Any]]] = []
"""Every operator and collective called so far, and its arguments in short."""

LOG = "EMULATED_NPU_LOG"
"""Variable that names a folder where each process writes down its calls, in a file of its number."""

_kept_alive: list[Any] = []
_planned: dict[int, dict[str, Any]] = {}
_numbers = itertools.count(1)


def aclnn(inputs: str, outputs: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register an emulation under its own name. The signatures are "name:letter ..." (see handles.ARGUMENTS)."""

    def register(emulate: Callable[..., None]) -> Callable[..., None]:
        OPERATORS[emulate.__name__] = Operator(emulate, _parse(inputs), _parse(outputs))
        return emulate

    return register


def note(name: str, arguments: dict[str, Any]) -> None:
    """Add a call to the list, and to the log with its first tensor."""
    calls.append((name, arguments))
    what = next(iter(arguments.values()), "")
    log(name, what[0] if isinstance(what, list) and what else what)


def log(name: str, what: Any) -> None:
    """Add a line to this process's file, where one is asked for."""
    if folder := os.environ.get(LOG):
        with (Path(folder) / str(os.getpid())).open("a") as file:
            file.write(f"{name}\t{what}\n")


def require(condition: bool, limit: str) -> None:
    """Refuse the call unless it keeps a documented limit."""
    if not condition:
        raise RefusedError(limit)


def chip() -> str:
    """Which generation is emulated, A2 or A3; see `ascend.cann.start`."""
    return "A3" if os.environ["EMULATED_NPU_CHIP"].startswith("Ascend910_93") else "A2"


def install(opapi: ctypes.CDLL, runtime: ctypes.CDLL) -> None:
    """Put every operator into the table that the trampolines jump through."""
    handles = Handles(opapi)
    symbols = table_symbols(OPERATORS)
    table = (c_void_p * len(symbols)).in_dll(opapi, "operator_table")
    for name, operator in OPERATORS.items():
        plan = _plan(name, operator, handles, runtime)
        run = _run(name, operator, runtime)
        _kept_alive.extend([plan, run])
        table[symbols.index(f"{name}GetWorkspaceSize")] = ctypes.cast(plan, c_void_p).value
        table[symbols.index(name)] = ctypes.cast(run, c_void_p).value


def _parse(signature: str) -> dict[str, str]:
    return dict(part.split(":") for part in signature.split())


def _plan(name: str, operator: Operator, handles: Handles, runtime: ctypes.CDLL) -> Any:
    prototype = ctypes.CFUNCTYPE(c_int, *operator.ctypes, POINTER(c_uint64), POINTER(c_void_p))
    codes = {**operator.inputs, **operator.outputs}

    def plan(*passed: Any) -> int:
        *values, workspace, executor = passed
        try:
            if not workspace or not executor:
                raise RefusedError("torch_npu passes other arguments than the emulation expects")
            arguments = {}
            for (argument, code), value in zip(codes.items(), values, strict=True):
                arguments[argument] = _read(handles, argument, code, value)
            note(name, {argument: in_short(value) for argument, value in arguments.items()})
            workspace[0], executor[0] = 0, next(_numbers)
            _planned[executor[0]] = arguments
            return 0
        except Exception as error:
            return _report(name, error, runtime)

    return prototype(plan)


def _read(handles: Handles, argument: str, code: str, value: Any) -> Any:
    try:
        return ARGUMENTS[code].read(handles, value)
    except RefusedError as error:
        raise RefusedError(f"{argument}: {error}") from None


def _run(name: str, operator: Operator, runtime: ctypes.CDLL) -> Any:
    prototype = ctypes.CFUNCTYPE(c_int, c_void_p, c_uint64, c_size_t, c_void_p)

    def run(workspace: int, size: int, executor: int, stream: int) -> int:
        arguments = _planned.pop(executor)
        try:
            for output in operator.outputs:
                _poison(arguments[output])
            operator.emulate(**arguments)
            return 0
        except Exception as error:
            return _report(name, error, runtime)

    return prototype(run)


def _poison(output: Tensor | list[Tensor] | None) -> None:
    """Fill an output with garbage, so that rows which no kernel writes cannot pass for results."""
    for tensor in output if isinstance(output, list) else [output]:
        if tensor is not None and tensor.dtype != torch.bool:
            tensor.fill_(torch.nan if tensor.is_floating_point() else GARBAGE)


def _report(name: str, error: Exception, runtime: ctypes.CDLL) -> int:
    """Leave the reason where torch_npu looks for it; a bug of the emulation shows its traceback."""
    if isinstance(error, RefusedError):
        runtime.emulation_set_error(f"{name}: {error}".encode())
        return REFUSED
    runtime.emulation_set_error(f"{name}, emulation: {traceback.format_exc()}".encode())
    return FAILED


def in_short(value: Any) -> Any:
    """An argument as the log keeps it: tensors by type and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return [in_short(item) for item in value] if isinstance(value, list) else value
