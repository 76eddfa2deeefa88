"""What a layer call takes the host, counted without a GPU: launches, and microseconds of Python.

    python -m benchmarks.cuda.host [--tokens 1 512] [--lmdeploy FOLDER]

Kernels are compiled for an H100 and launched into a driver that does nothing; tensors lie on the CPU, where torch's own
operators run. So the microseconds, of processor time, are those of Python and of torch on the way to the driver, on
this machine: compare them with each other. All take turns, and the least of many calls counts. What the driver's C
functions take (a launch, the encoding of a TMA descriptor) is not in it. "gathered" is our layer whose first product
reads its rows where the tokens lie.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from benchmarks.cuda.cases import QWEN3, gathering
from benchmarks.cuda.lmdeploy import MOE, LMDeploy
from epbackend.device.cuda import CudaDevice
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels import ExpertWeights
from epbackend.kernels.triton.kernels import TritonKernels
from epbackend.kernels.triton.tiles import H100
from epbackend.kernels.triton.tuning import ExpertShape
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

CALLS, TURNS = 20, 40
NO_LAUNCH = ("empty", "new_empty", "view", "slice", "select", "item", "flatten", "unflatten", "to.")
"""Operators of torch that launch nothing on a GPU, by the beginning of their names."""


class StubbedDriver:
    """A Triton driver of a GPU that computes nothing; `launched` counts by kernel."""

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": H100.shared_bytes},
            fill_tma_descriptor_tiled=lambda *_: b"",
            build_signature_metadata=lambda signature: b"",
            launch=self._launch,
        )
        self.launcher_cls = nvidia.CudaLauncher

    def _launch(self, _x: int, _y: int, _z: int, _stream: int, function: str, *_: Any) -> None:
        self.launched[function] += 1

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@cache
def the_stub() -> StubbedDriver:
    """One for the process, because Triton keeps what it launched through it."""
    return StubbedDriver()


@contextmanager
def stubbed_gpu() -> Iterator[StubbedDriver]:
    """Inside, an H100 is there by name, and device `cuda` takes the CPU's tensors."""
    stub, before = the_stub(), driver._active
    driver.set_active(stub)
    with (
        mock.patch.multiple(nvidia, PyKernelArg=dict, ARG_CONSTEXPR=0, ARG_KERNEL=1, ARG_TUPLE=2),
        mock.patch.object(CudaDevice, "unavailable", return_value=None),
        mock.patch.object(CudaDevice, "kernel_set", side_effect=lambda name: TritonKernels(H100)),
    ):
        try:
            yield stub
        finally:
            driver.set_active(before)


class TorchLaunches(TorchDispatchMode):
    """Counts what torch's own operators would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if not name.startswith(NO_LAUNCH):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def on_hopper() -> Iterator[None]:
    """Inside, LMDeploy's kernels take the way that they take on a Hopper GPU, with the first of their tiles."""
    moe = import_module(f"{MOE}.fused_moe")
    activation = import_module("lmdeploy.pytorch.kernels.cuda.activation")
    props, kernel = {"multi_processor_count": H100.sms, "warps_per_sm": 64}, moe.fused_moe_kernel
    with (
        mock.patch.object(moe, "_supports_single_cta_route_prepare", return_value=True),
        mock.patch.object(moe, "_supports_compact_moe", return_value=True),
        mock.patch.object(activation, "get_device_props", return_value=props),
        mock.patch.object(kernel, "configs", kernel.configs[:1]),
    ):
        yield


def calls(experts: ExpertShape, tokens: int, lmdeploy: LMDeploy | None) -> dict[str, Callable[[], Tensor]]:
    """Who -> one call of the same layer; few tokens decode."""
    weights = ExpertWeights(
        torch.empty(experts.slots, 2 * experts.F, experts.D, dtype=torch.bfloat16),
        torch.empty(experts.slots, experts.D, experts.F, dtype=torch.bfloat16),
    )
    hidden_TD = torch.zeros(tokens, experts.D, dtype=torch.bfloat16)
    scores = torch.rand(tokens, experts.slots).softmax(-1).topk(experts.top_k)
    weights_TK, ids_TK = scores.values, scores.indices

    def layer() -> Callable[[], Tensor]:
        made = ExpertParallelMoE(
            weights.gate_up,
            weights.down,
            slot_map=SlotMap.uniform(experts.slots, 1),
            ranks=RankGroup.single(),
            settings=DispatchSettings(),
            top_k=experts.top_k,
            renormalize=True,
            device="cuda",
        )
        phase = "decode" if tokens <= 256 else "prefill"
        return lambda: made(hidden_TD, ids_TK, weights_TK, phase=phase)

    ours, gathered = layer(), layer()
    with gathering():
        gathered()

    def theirs() -> Tensor:
        assert lmdeploy
        return lmdeploy.half(hidden_TD, weights, weights_TK, ids_TK, renormalize=True)

    both = {"epbackend": ours, "gathered": gathered}
    return both | ({"LMDeploy": theirs} if lmdeploy else {})


def launches(call: Callable[[], Tensor], stub: StubbedDriver) -> dict[str, int]:
    """Kernel -> how often one call launches it; compiles what it needs first."""
    call()
    stub.launched.clear()
    with TorchLaunches() as by_torch:
        call()
    return {**stub.launched, **{f"torch {name}": count for name, count in by_torch.launched.items()}}


def least_us(call: Callable[[], Tensor]) -> float:
    began = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - began) * 1e6 / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.host")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--lmdeploy", type=Path, help="folder of an unpacked LMDeploy wheel")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lmdeploy = LMDeploy.found(asked.lmdeploy)
    with ExitStack() as stack:
        stub = stack.enter_context(stubbed_gpu())
        stack.enter_context(torch.inference_mode())
        if lmdeploy:
            stack.enter_context(on_hopper())
        for tokens in asked.tokens:
            every = calls(QWEN3, tokens, lmdeploy)
            launched = {who: launches(call, stub) for who, call in every.items()}
            us = dict.fromkeys(every, float("inf"))
            for _ in range(TURNS):
                for who, call in every.items():
                    us[who] = min(us[who], least_us(call))
            for who, kernels in launched.items():
                names = ", ".join(f"{count} {name}" for name, count in kernels.items())
                print(f"T={tokens:<5}{who:10}{us[who]:7.0f} us, {sum(kernels.values())} launches: {names}")


if __name__ == "__main__":
    main()
