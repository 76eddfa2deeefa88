"""Grouped products compiled by numba, of weights as they lie in memory, in each of the project's formats.

oneDNN and MKL have no fast product of bfloat16 or float16 on processors without AVX512, none of float8, and an exact
one of int8 only with VNNI. Here weights are widened to float32 in registers, so that a product reads their few bytes
once and no wider copy exists. A call takes all slots together: the threads of torch's own OpenMP team draw tasks, each
of one slot and `BLOCK_N` outputs, so that experts run beside each other and there is one fork and one join.

Shapes: L slots, N outputs and K inputs of a matrix, S rows sorted by slot, B blocks of inputs that share a scale.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

BLOCK_N = 32
"""Outputs of a task: 32 rows of 2048 weights are 64 to 256 KiB, which stay in a core's cache for all rows of a slot."""

ROWS_AT_ONCE = 32
"""Rows of a slot that a task multiplies before it reads its weights again: they stay in the cache as well."""

STORED: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
    torch.int8: np.int8,
    torch.float8_e4m3fn: np.uint8,
}
"""How numba sees the bits of each format. Each has a type of its own, by which `widened` knows it."""


def compiled(function: Callable[..., Any]) -> Any:
    """Decorator of what the threads run. Sums are fused and of any order, but NaN and infinity count."""
    # Where numba finds no place that it may write to, as in a container, each process compiles for itself.
    made = njit(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)
    with suppress(RuntimeError):
        made.enable_caching()
    return made


def instruction(function: Callable[..., Any]) -> Any:
    """Decorator of what numba has no Python for: the function gets types, and returns a signature and a generator."""
    return intrinsic(function)


@instruction
def widened(typing_context: Any, bits: types.Type) -> tuple[Any, Callable[..., Any]]:
    """One stored weight as float32. Of float8 it gives the value / `products.FLOAT8_UNIT`: its bits as a float16's."""
    word, half, single = ir.IntType(16), ir.HalfType(), ir.FloatType()

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.uint16:
            high = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(high, single)
        if bits == types.int16:
            return builder.fpext(builder.bitcast(value, half), single)
        if bits == types.uint8:
            value = builder.zext(value, word)
            magnitude = builder.and_(value, ir.Constant(word, 0x7F))
            sign = builder.shl(builder.and_(value, ir.Constant(word, 0x80)), ir.Constant(word, 8))
            is_nan = builder.icmp_unsigned("==", magnitude, ir.Constant(word, 0x7F))
            shifted = builder.shl(magnitude, ir.Constant(word, 7))
            nan = ir.Constant(word, 0x7E00)
            return builder.fpext(
                builder.bitcast(builder.or_(builder.select(is_nan, nan, shifted), sign), half), single
            )
        return builder.sitofp(value, single) if bits == types.int8 else value

    return types.float32(bits), generate


@instruction
def pointer(typing_context: Any, address: types.Type) -> tuple[Any, Callable[..., Any]]:
    """An address (int64) as a pointer."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@instruction
def draw(typing_context: Any, address: types.Type) -> tuple[Any, Callable[..., Any]]:
    """The number (int64) at an address, which is one higher for whoever draws next."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        place = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(number, 1), "monotonic")

    return types.int64(types.int64), generate


@instruction
def address_of(typing_context: Any, place: types.Type) -> tuple[Any, Callable[..., Any]]:
    """The reverse of `pointer`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


@compiled
def four_rows(rows_SK, end, weight_NK, scale_BB, block_n, block_k, sums_SN, row, output):
    """Four rows times two outputs: the eight sums stay in registers, and a weight is widened once for four rows.

    Where fewer rows are left before `end`, the last one is taken several times.
    """
    row_1, row_2, row_3 = min(row + 1, end - 1), min(row + 2, end - 1), min(row + 3, end - 1)
    depth, scales = rows_SK.shape[1], scale_BB.shape[1]
    zero = np.float32(0)
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = zero
    for block in range((depth + block_k - 1) // block_k):
        start, stop = block * block_k, min(depth, (block + 1) * block_k)
        # Slices, because only an index that counts up from zero makes vector instructions.
        r0, r1 = rows_SK[row, start:stop], rows_SK[row_1, start:stop]
        r2, r3 = rows_SK[row_2, start:stop], rows_SK[row_3, start:stop]
        first_K, second_K = weight_NK[output, start:stop], weight_NK[output + 1, start:stop]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
        for k in range(stop - start):
            a, b = widened(first_K[k]), widened(second_K[k])
            a0 += a * r0[k]
            a1 += a * r1[k]
            a2 += a * r2[k]
            a3 += a * r3[k]
            b0 += b * r0[k]
            b1 += b * r1[k]
            b2 += b * r2[k]
            b3 += b * r3[k]
        # One scale for all blocks of inputs, or one for each.
        a, b = scale_BB[output // block_n, block % scales], scale_BB[(output + 1) // block_n, block % scales]
        s0, s1, s2, s3 = s0 + a0 * a, s1 + a1 * a, s2 + a2 * a, s3 + a3 * a
        t0, t1, t2, t3 = t0 + b0 * b, t1 + b1 * b, t2 + b2 * b, t3 + b3 * b
    sums_SN[row, output], sums_SN[row, output + 1] = s0, t0
    sums_SN[row_1, output], sums_SN[row_1, output + 1] = s1, t1
    sums_SN[row_2, output], sums_SN[row_2, output + 1] = s2, t2
    sums_SN[row_3, output], sums_SN[row_3, output + 1] = s3, t3


@compiled
def one_row(rows_SK, weight_NK, scale_BB, block_n, block_k, sums_SN, row, output):
    """One row times one output."""
    depth, scales = rows_SK.shape[1], scale_BB.shape[1]
    total = np.float32(0)
    for block in range((depth + block_k - 1) // block_k):
        start, stop = block * block_k, min(depth, (block + 1) * block_k)
        row_K, weight_K = rows_SK[row, start:stop], weight_NK[output, start:stop]
        part = np.float32(0)
        for k in range(stop - start):
            part += widened(weight_K[k]) * row_K[k]
        total += part * scale_BB[output // block_n, block % scales]
    sums_SN[row, output] = total


@compiled
def task(rows_SK, weight_NK, scale_BB, block_n, block_k, sums_SN, first, last, start, stop):
    """Rows [first, last) of one slot times its outputs [start, stop)."""
    for begin in range(first, last, ROWS_AT_ONCE):
        end = min(last, begin + ROWS_AT_ONCE)
        # A single row that is left over costs less alone.
        fours = end - 1 if (end - begin) % 4 == 1 else end
        pairs = start + (stop - start) // 2 * 2
        for output in range(start, pairs, 2):
            for row in range(begin, fours, 4):
                four_rows(rows_SK, end, weight_NK, scale_BB, block_n, block_k, sums_SN, row, output)
            for row in range(fours, end):
                one_row(rows_SK, weight_NK, scale_BB, block_n, block_k, sums_SN, row, output)
                one_row(rows_SK, weight_NK, scale_BB, block_n, block_k, sums_SN, row, output + 1)
        for output in range(pairs, stop):
            for row in range(begin, end):
                one_row(rows_SK, weight_NK, scale_BB, block_n, block_k, sums_SN, row, output)


CALL = np.dtype(
    [(name, np.int64) for name in (
        "rows", "rows_at", "inputs", "sums_at", "outputs", "slots", "weights_at", "first_at", "last_at",
        "scales_at", "scale_bytes", "scale_rows", "scale_columns", "block_n", "block_k", "next_task",
    )]
)  # fmt: skip
"""What the threads of a call read: sizes, and addresses of memory that the caller holds. `next_task` is theirs."""

NEXT_TASK = CALL.fields["next_task"][1]  # type: ignore[index]


@cache
def threads_part(dtype: torch.dtype) -> Any:
    """What each thread of a call runs, for weights of a format: a C function of the address of a `CALL`."""
    stored = STORED[dtype]

    def draw_tasks(argument):
        call = carray(argument, 1, CALL)[0]
        address = address_of(argument)
        rows_SK = carray(pointer(call.rows_at), (call.rows, call.inputs), np.float32)
        sums_SN = carray(pointer(call.sums_at), (call.rows, call.outputs), np.float32)
        weights_at_L = carray(pointer(call.weights_at), call.slots, np.int64)
        first_L = carray(pointer(call.first_at), call.slots, np.int64)
        last_L = carray(pointer(call.last_at), call.slots, np.int64)
        blocks = (call.outputs + BLOCK_N - 1) // BLOCK_N
        while True:
            number = draw(address + NEXT_TASK)
            slot, block = number // blocks, number % blocks
            if slot >= call.slots:
                return
            if first_L[slot] == last_L[slot]:
                continue
            task(
                rows_SK,
                carray(pointer(weights_at_L[slot]), (call.outputs, call.inputs), stored),
                carray(
                    pointer(call.scales_at + slot * call.scale_bytes),
                    (call.scale_rows, call.scale_columns),
                    np.float32,
                ),
                call.block_n,
                call.block_k,
                sums_SN,
                first_L[slot],
                last_L[slot],
                block * BLOCK_N,
                min(call.outputs, (block + 1) * BLOCK_N),
            )

    made = partial(cfunc, types.void(types.voidptr), error_model="numpy")
    try:
        return made(cache=True)(draw_tasks)
    except RuntimeError:  # as in `compiled`
        return made()(draw_tasks)


def grouped_product(
    rows_SK: Tensor,
    weights_at_L: np.ndarray,
    first_L: np.ndarray,
    last_L: np.ndarray,
    dtype: torch.dtype,
    outputs: int,
    scale_LBB: Tensor,
    block_n: int,
    block_k: int,
) -> Tensor:
    """sums_SN (float32): each row times the transposed matrix of its slot.

    Args:
        rows_SK: float32, contiguous.
        weights_at_L: addresses (int64) of each slot's contiguous [outputs, K] matrix, which the caller holds.
        first_L: the first row of each slot (int64).
        last_L: the row after its last one. Rows of no slot stay garbage.
        dtype: of the weights, one of `STORED`.
        outputs: N.
        scale_LBB: see `products.Scales`; contiguous.
        block_n: as there.
        block_k: as there.
    """
    sums_SN = rows_SK.new_empty(len(rows_SK), outputs)
    call = np.zeros(1, CALL)
    call["rows"], call["inputs"] = rows_SK.shape
    call["rows_at"], call["sums_at"], call["outputs"] = rows_SK.data_ptr(), sums_SN.data_ptr(), outputs
    call["weights_at"], call["slots"] = weights_at_L.ctypes.data, len(weights_at_L)
    call["first_at"], call["last_at"] = first_L.ctypes.data, last_L.ctypes.data
    call["scales_at"] = scale_LBB.data_ptr()
    call["scale_bytes"] = scale_LBB[0].nbytes if len(scale_LBB) > 1 else 0
    call["scale_rows"], call["scale_columns"] = scale_LBB.shape[1:]
    call["block_n"], call["block_k"] = block_n, block_k
    part, address = threads_part(dtype), call.ctypes.data
    if (team := openmp()) is None:
        part.ctypes(address)
    else:
        team(part.address, address, torch.get_num_threads(), 0)
    return sums_SN


@cache
def openmp() -> Any:
    """`GOMP_parallel` of the OpenMP library that torch has loaded: its threads do the work. None: there is none.

    It is what compilers turn `#pragma omp parallel` into: a function, its argument, the number of threads, flags.
    """
    try:
        parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
