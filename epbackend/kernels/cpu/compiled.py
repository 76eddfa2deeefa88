"""Grouped products compiled by numba, of weights as they lie in memory, in each of the project's formats.

oneDNN and MKL have no fast product of bfloat16 or float16 on processors without AVX512, none of float8, and an exact
one of int8 only with VNNI. Here weights are widened to float32 in registers, so that a product reads their few bytes
once and no wider copy exists. A call takes all slots together: the threads of torch's own OpenMP team draw tasks, each
of one slot and some of its outputs, so that experts run beside each other and there is one fork and one join.

Shapes: L slots, X of them with rows, N outputs and K inputs of a matrix, S rows sorted by slot, B blocks of inputs that
share a scale.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial, reduce
from itertools import product
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from epbackend.kernels import fp8

BLOCK_N = 32
"""Outputs that meet all rows of a slot before the next do: 32 x 2048 weights, at most 256 KiB, stay in the cache."""

TASK_BLOCKS = 4
"""Blocks of a task, where there are tasks enough: a thread reads memory faster where it goes on for longer."""

TASKS_OF_A_THREAD = 8
"""So many tasks that threads which end early find more to do."""

ROWS_AT_ONCE = 32
"""Rows of a slot that a task multiplies before it reads its weights again: they stay in the cache as well."""

MANY_ROWS = 8
"""From so many rows of a slot on, a task's weights are widened once for all of them."""

LANES = 16
"""Products of int8 that a vector holds."""

SCALE_BLOCK = fp8.BLOCK
"""Outputs and inputs that share a scale of float8; a multiple of `BLOCK_N`."""

FLOAT8_IN_SCALES, FLOAT8_IN_SUMS = np.float32(2.0**100), np.float32(2.0**20)
"""The two factors of 2**120: all of it in the scales would let large ones overflow."""

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
    """One stored weight as float32. Float8's come out 2**120 times too small, and NaN as 480: see `restore`."""
    whole, half, single = ir.IntType(32), ir.HalfType(), ir.FloatType()

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.uint16:
            high = builder.shl(builder.zext(value, whole), ir.Constant(whole, 16))
            return builder.bitcast(high, single)
        if bits == types.int16:
            return builder.fpext(builder.bitcast(value, half), single)
        if bits == types.uint8:
            # Sign, exponent and mantissa where float32 has them, by one shift; the sign comes along from its copies.
            moved = builder.shl(builder.sext(value, whole), ir.Constant(whole, 20))
            return builder.bitcast(builder.and_(moved, ir.Constant(whole, 0x87F00000)), single)
        return builder.sitofp(value, single) if bits == types.int8 else value

    return types.float32(bits), generate


@instruction
def nan_seen(typing_context: Any, before: types.Type, bits: types.Type) -> tuple[Any, Callable[..., Any]]:
    """`before` (uint8), with its highest bit set where a weight of float8 is NaN; other formats' NaN need no search."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        before, value = arguments
        if bits != types.uint8:
            return before
        magnitude = builder.and_(value, ir.Constant(value.type, 0x7F))
        return builder.or_(before, builder.add(magnitude, ir.Constant(value.type, 1)))

    return types.uint8(types.uint8, bits), generate


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
def four_rows(rows_MK, weight_NK, sums_MN, row, first, second):
    """Four rows times two outputs: the eight sums stay in registers, and a weight is widened once for four rows.

    Where fewer rows are left, the last one is taken several times.
    """
    last = len(rows_MK) - 1
    row_1, row_2, row_3 = min(row + 1, last), min(row + 2, last), min(row + 3, last)
    # Slices, because only an index that counts up from zero makes vector instructions.
    r0, r1, r2, r3 = rows_MK[row], rows_MK[row_1], rows_MK[row_2], rows_MK[row_3]
    first_K, second_K = weight_NK[first], weight_NK[second]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for k in range(rows_MK.shape[1]):
        a, b = widened(first_K[k]), widened(second_K[k])
        a0 += a * r0[k]
        a1 += a * r1[k]
        a2 += a * r2[k]
        a3 += a * r3[k]
        b0 += b * r0[k]
        b1 += b * r1[k]
        b2 += b * r2[k]
        b3 += b * r3[k]
    sums_MN[row, first], sums_MN[row, second] = a0, b0
    sums_MN[row_1, first], sums_MN[row_1, second] = a1, b1
    sums_MN[row_2, first], sums_MN[row_2, second] = a2, b2
    sums_MN[row_3, first], sums_MN[row_3, second] = a3, b3


@compiled
def two_rows(rows_MK, weight_NK, sums_MN, row, first, distance):
    """Two rows times four outputs."""
    second, third, fourth = first + distance, first + 2 * distance, first + 3 * distance
    r0, r1 = rows_MK[row], rows_MK[row + 1]
    first_K, second_K, third_K, fourth_K = (
        weight_NK[first],
        weight_NK[second],
        weight_NK[third],
        weight_NK[fourth],
    )
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = np.float32(0)
    for k in range(rows_MK.shape[1]):
        a, b, c, d = widened(first_K[k]), widened(second_K[k]), widened(third_K[k]), widened(fourth_K[k])
        a0 += a * r0[k]
        a1 += a * r1[k]
        b0 += b * r0[k]
        b1 += b * r1[k]
        c0 += c * r0[k]
        c1 += c * r1[k]
        d0 += d * r0[k]
        d1 += d * r1[k]
    sums_MN[row, first], sums_MN[row, second], sums_MN[row, third], sums_MN[row, fourth] = a0, b0, c0, d0
    row += 1
    sums_MN[row, first], sums_MN[row, second], sums_MN[row, third], sums_MN[row, fourth] = a1, b1, c1, d1


@compiled
def one_row(rows_MK, weight_NK, sums_MN, row, first, distance):
    """One row times four outputs."""
    second, third, fourth = first + distance, first + 2 * distance, first + 3 * distance
    row_K = rows_MK[row]
    first_K, second_K, third_K, fourth_K = (
        weight_NK[first],
        weight_NK[second],
        weight_NK[third],
        weight_NK[fourth],
    )
    a = b = c = d = np.float32(0)
    for k in range(len(row_K)):
        value = row_K[k]
        a += widened(first_K[k]) * value
        b += widened(second_K[k]) * value
        c += widened(third_K[k]) * value
        d += widened(fourth_K[k]) * value
    sums_MN[row, first], sums_MN[row, second], sums_MN[row, third], sums_MN[row, fourth] = a, b, c, d


@compiled
def float_products(rows_MK, weight_NK, sums_MN):
    """Rows of a slot times some of its outputs.

    Outputs that are multiplied together lie apart, and each one's neighbour comes next: so a thread reads several
    stretches of memory at once, which the processor fetches ahead, and gets more of it than by one stretch.
    """
    rows, quarter, half = len(rows_MK), len(weight_NK) // 4, len(weight_NK) // 2
    fours = rows // 4 * 4 if rows % 4 < 3 else rows
    if fours:
        for output in range(half):
            for row in range(0, fours, 4):
                four_rows(rows_MK, weight_NK, sums_MN, row, output, output + half)
    for output in range(quarter):
        if rows - fours == 2:
            two_rows(rows_MK, weight_NK, sums_MN, fours, output, quarter)
        elif rows - fours == 1:
            one_row(rows_MK, weight_NK, sums_MN, fours, output, quarter)
    # Outputs that are left over meet rows singly.
    for row in range(rows):
        for output in range(2 * half if row < fours else 4 * quarter, len(weight_NK)):
            one_row(rows_MK, weight_NK, sums_MN, row, output, 0)


@compiled
def widen(weight_NK, scale_BB, start, wide_NK):
    """Fill `wide_NK` with weights, times the scales of their blocks where they have some. `start`: the first output."""
    for output in range(len(weight_NK)):
        weight_K, wide_K = weight_NK[output], wide_NK[output]
        if scale_BB.shape[1] == 0:
            fill(weight_K, np.float32(1), wide_K)
        for block in range(scale_BB.shape[1]):
            begin, end = block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK
            scale = scale_BB[(start + output) // SCALE_BLOCK, block] * FLOAT8_IN_SCALES
            fill(weight_K[begin:end], scale, wide_K[begin:end])


@compiled
def fill(weight_K, scale, wide_K):
    """Fill `wide_K` with weights times one scale."""
    for k in range(len(weight_K)):
        wide_K[k] = widened(weight_K[k]) * scale


@compiled
def scale_rows(rows_MK, scale_B, scaled_MK):
    """Fill `scaled_MK` with rows times the scales of the weights that they meet, block by block."""
    for row in range(len(rows_MK)):
        row_K, scaled_K = rows_MK[row], scaled_MK[row]
        for block in range(len(scale_B)):
            begin, end = block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK
            scale = scale_B[block] * FLOAT8_IN_SCALES
            part_K, result_K = row_K[begin:end], scaled_K[begin:end]
            for k in range(len(part_K)):
                result_K[k] = part_K[k] * scale


@compiled
def restore(weight_NK, sums_MN):
    """Give float8's sums what `widened` and the scales left out, or NaN where a weight is NaN.

    Bytes are searched for NaN 32 at a time, which costs less than a choice in the products.
    """
    for row in range(len(sums_MN)):
        sums_N = sums_MN[row]
        for output in range(len(sums_N)):
            sums_N[output] *= FLOAT8_IN_SUMS
    for output in range(len(weight_NK)):
        weight_K, seen = weight_NK[output], np.uint8(0)
        for k in range(len(weight_K)):
            seen = nan_seen(seen, weight_K[k])
        if seen > 127:
            for row in range(len(sums_MN)):
                sums_MN[row, output] = np.nan


@compiled
def float_task(rows_MK, weight_NK, scale_BB, start, wide_NK, sums_MN):
    """Rows of one slot times a block of its outputs, of which `start` is the first.

    Weights that meet many rows are widened once, into a buffer; where few come, scales are multiplied into the rows,
    which is less to do.
    """
    if len(wide_NK) and len(rows_MK) >= MANY_ROWS:
        widen(weight_NK, scale_BB, start, wide_NK)
        for begin in range(0, len(rows_MK), ROWS_AT_ONCE):
            end = begin + ROWS_AT_ONCE
            float_products(rows_MK[begin:end], wide_NK[: len(weight_NK)], sums_MN[begin:end])
    elif len(scale_BB):
        scaled_MK = wide_NK[: len(rows_MK)]
        scale_rows(rows_MK, scale_BB[start // SCALE_BLOCK], scaled_MK)
        float_products(scaled_MK, weight_NK, sums_MN)
    else:
        for begin in range(0, len(rows_MK), ROWS_AT_ONCE):
            end = begin + ROWS_AT_ONCE
            float_products(rows_MK[begin:end], weight_NK, sums_MN[begin:end])
    if len(scale_BB):
        restore(weight_NK, sums_MN)


@instruction
def int8_tile(
    typing_context: Any,
    rows_at: types.Type,
    rows: types.Type,
    weights_at: types.Type,
    outputs: types.Type,
    inputs: types.Type,
    sums_at: types.Type,
    stride: types.Type,
) -> tuple[Any, Callable[..., Any]]:
    """Store sums of some rows (int16) times some outputs' weights (int8), over as many inputs as fill whole vectors.

    The first three pairs are matrices' addresses and a tuple of their rows; `stride` is between the rows of the sums.
    Loops of numba never become the instruction of two products and their sum, which makes twice as many products as
    one of float32: here its pattern is written down, for LLVM to find what the processor has.
    """
    byte, half, whole, place = (ir.IntType(bits) for bits in (8, 16, 32, 64))
    single = ir.FloatType()
    wide, narrow = ir.VectorType(whole, LANES), ir.VectorType(whole, LANES // 2)
    even, odd = (ir.Constant(narrow, list(range(first, LANES, 2))) for first in (0, 1))

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        rows_at, rows, weights_at, outputs, inputs, sums_at, stride = arguments
        row_numbers, output_numbers = (cgutils.unpack_tuple(builder, each) for each in (rows, outputs))

        def at(address: Any, number: Any, element: ir.Type) -> Any:
            return builder.gep(builder.inttoptr(address, element.as_pointer()), [number])

        def load(start: Any, k: Any, element: ir.IntType) -> Any:
            """`LANES` values as int32."""
            where = builder.bitcast(builder.gep(start, [k]), ir.VectorType(element, LANES).as_pointer())
            return builder.sext(builder.load(where, align=element.width // 8), wide)

        row_starts = [at(rows_at, builder.mul(row, inputs), half) for row in row_numbers]
        weight_starts = [at(weights_at, builder.mul(output, inputs), byte) for output in output_numbers]
        sums = [
            cgutils.alloca_once_value(builder, ir.Constant(narrow, None))
            for _ in range(len(row_starts) * len(weight_starts))
        ]
        lanes = ir.Constant(place, LANES)
        end = builder.mul(builder.udiv(inputs, lanes), lanes)
        with cgutils.for_range_slice(builder, ir.Constant(place, 0), end, lanes) as (k, _):
            row_values = [load(start, k, half) for start in row_starts]
            weight_values = [load(start, k, byte) for start in weight_starts]
            for total, (weight, row) in zip(sums, product(weight_values, row_values), strict=True):
                products = builder.mul(row, weight)
                pair = [builder.shuffle_vector(products, wide(ir.Undefined), which) for which in (even, odd)]
                builder.store(builder.add(builder.load(total), builder.add(*pair)), total)
        for total, (output, row) in zip(sums, product(output_numbers, row_numbers), strict=True):
            found = builder.load(total)
            each = (builder.extract_element(found, whole(lane)) for lane in range(LANES // 2))
            found = builder.sitofp(reduce(builder.add, each), single)
            builder.store(found, at(sums_at, builder.add(builder.mul(row, stride), output), single))
        return context.get_dummy_value()

    return types.void(
        types.int64, rows, types.int64, outputs, types.int64, types.int64, types.int64
    ), generate


@compiled
def int8_task(rows_MK, weight_NK, scale_N, sums_MN):
    """Rows of one slot times a block of its outputs, which are taken as by `float_products`."""
    inputs, last, half, quarter = rows_MK.shape[1], len(rows_MK) - 1, len(weight_NK) // 2, len(weight_NK) // 4
    rows_at, weights_at, sums_at = rows_MK.ctypes.data, weight_NK.ctypes.data, sums_MN.ctypes.data
    stride = sums_MN.strides[0] // 4
    for begin in range(0, len(rows_MK), ROWS_AT_ONCE):
        end = min(len(rows_MK), begin + ROWS_AT_ONCE)
        fours = end - 1 if (end - begin) % 4 == 1 else end
        for output in range(half):
            for row in range(begin, fours, 4):
                four = (row, min(row + 1, last), min(row + 2, last), min(row + 3, last))
                int8_tile(rows_at, four, weights_at, (output, output + half), inputs, sums_at, stride)
        for row in range(fours, end):
            for output in range(quarter):
                apart = (output, output + quarter, output + 2 * quarter, output + 3 * quarter)
                int8_tile(rows_at, (row,), weights_at, apart, inputs, sums_at, stride)
        for row in range(begin, end):
            for output in range(2 * half if row < fours else 4 * quarter, len(weight_NK)):
                int8_tile(rows_at, (row,), weights_at, (output,), inputs, sums_at, stride)
    for row in range(len(rows_MK)):
        for output in range(len(weight_NK)):
            total = sums_MN[row, output]
            for k in range(inputs // LANES * LANES, inputs):
                total += np.float32(rows_MK[row, k]) * np.float32(weight_NK[output, k])
            sums_MN[row, output] = total * scale_N[output]


CALL = np.dtype(
    [(name, np.int64) for name in (
        "rows", "rows_at", "inputs", "sums_at", "outputs", "task_outputs", "slots", "busy", "busy_at", "weights_at",
        "first_at", "last_at", "scales_at", "scale_rows", "scale_columns", "buffers_at", "buffer_rows", "next_task",
        "next_buffer",
    )]
)  # fmt: skip
"""What the threads of a call read: sizes, and addresses of memory that the caller holds. `next_*` are theirs."""

NEXT_TASK, NEXT_BUFFER = (CALL.fields[name][1] for name in ("next_task", "next_buffer"))  # type: ignore[index]


@cache
def threads_part(dtype: torch.dtype) -> Any:
    """What each thread of a call runs, for weights of a format: a C function of the address of a `CALL`."""
    stored = STORED[dtype]
    exact = dtype == torch.int8
    row_type = np.int16 if exact else np.float32

    def draw_tasks(argument):
        call = carray(argument, 1, CALL)[0]
        address = address_of(argument)
        rows_SK = carray(pointer(call.rows_at), (call.rows, call.inputs), row_type)
        sums_SN = carray(pointer(call.sums_at), (call.rows, call.outputs), np.float32)
        weights_at_L = carray(pointer(call.weights_at), call.slots, np.int64)
        busy_X = carray(pointer(call.busy_at), call.busy, np.int64)
        first_L = carray(pointer(call.first_at), call.slots, np.int64)
        last_L = carray(pointer(call.last_at), call.slots, np.int64)
        scale_LBB = carray(
            pointer(call.scales_at), (call.slots, call.scale_rows, call.scale_columns), np.float32
        )
        buffer = draw(address + NEXT_BUFFER) * call.buffer_rows * call.inputs * 4
        wide_NK = carray(pointer(call.buffers_at + buffer), (call.buffer_rows, call.inputs), np.float32)
        tasks = (call.outputs + call.task_outputs - 1) // call.task_outputs
        while True:
            number = draw(address + NEXT_TASK)
            if number >= call.busy * tasks:
                return
            slot, begin = busy_X[number // tasks], number % tasks * call.task_outputs
            first, last = first_L[slot], last_L[slot]
            weight_NK = carray(pointer(weights_at_L[slot]), (call.outputs, call.inputs), stored)
            for start in range(begin, min(call.outputs, begin + call.task_outputs), BLOCK_N):
                stop = min(call.outputs, start + BLOCK_N)
                part_NK, sums_MN = weight_NK[start:stop], sums_SN[first:last, start:stop]
                if exact:
                    int8_task(rows_SK[first:last], part_NK, scale_LBB[slot, start:stop, 0], sums_MN)
                else:
                    float_task(rows_SK[first:last], part_NK, scale_LBB[slot], start, wide_NK, sums_MN)

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
    scale_LBB: Tensor | None = None,
) -> Tensor:
    """sums_SN (float32): each row times the transposed matrix of its slot.

    Args:
        rows_SK: contiguous; float32, or int16 (values of int8) where the weights are int8.
        weights_at_L: addresses (int64) of each slot's contiguous [outputs, K] matrix, which the caller holds.
        first_L: the first row of each slot (int64).
        last_L: the row after its last one. Rows of no slot stay garbage.
        dtype: of the weights, one of `STORED`.
        outputs: N.
        scale_LBB: what weights are multiplied by (float32, contiguous): of float8 one for each block; of int8 one for
            each output [L, N, 1]; None for others.
    """
    threads = torch.get_num_threads()
    sums_SN = torch.empty(len(rows_SK), outputs, dtype=torch.float32, device="cpu")
    # Threads draw no tasks of the others, which are most of them where few rows come.
    busy_X = np.flatnonzero(last_L > first_L)
    widens = dtype in (torch.bfloat16, torch.float16) and (last_L - first_L).max(initial=0) >= MANY_ROWS
    buffer_rows = BLOCK_N if widens or dtype == torch.float8_e4m3fn else 0
    buffers = torch.empty(threads * buffer_rows, rows_SK.shape[1], dtype=torch.float32, device="cpu")
    call = np.zeros(1, CALL)
    call["rows"], call["inputs"] = rows_SK.shape
    call["rows_at"], call["sums_at"], call["outputs"] = rows_SK.data_ptr(), sums_SN.data_ptr(), outputs
    call["task_outputs"] = outputs_of_a_task(len(busy_X), outputs, threads)
    call["weights_at"], call["slots"] = weights_at_L.ctypes.data, len(weights_at_L)
    call["busy_at"], call["busy"] = busy_X.ctypes.data, len(busy_X)
    call["first_at"], call["last_at"] = first_L.ctypes.data, last_L.ctypes.data
    call["buffers_at"], call["buffer_rows"] = buffers.data_ptr(), buffer_rows
    if scale_LBB is not None:
        call["scales_at"] = scale_LBB.data_ptr()
        call["scale_rows"], call["scale_columns"] = scale_LBB.shape[1:]
    part, address = threads_part(dtype), call.ctypes.data
    if (team := openmp()) is None:
        part.ctypes(address)
    else:
        team(part.address, address, threads, 0)
    return sums_SN


def outputs_of_a_task(slots: int, outputs: int, threads: int) -> int:
    """So many outputs of a slot that threads go on for long, but do not wait for the last one's task."""
    blocks = slots * -(-outputs // BLOCK_N)
    return BLOCK_N * (TASK_BLOCKS if blocks >= TASK_BLOCKS * TASKS_OF_A_THREAD * threads else 1)


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
