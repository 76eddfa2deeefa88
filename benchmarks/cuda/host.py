"""What a layer call takes the host, counted without a GPU: launches, and microseconds of Python.

    python -m benchmarks.cuda.host [--tokens 1 1024] [--lmdeploy FOLDER] [--profile]

Kernels are compiled for an H100 and launched into a driver that does nothing; tensors lie on the CPU, where torch's own
operators run. So the microseconds are those of Python and of torch on the way to the driver, on this machine: compare
the two with each other. They take turns, and the least of many calls counts. What the driver's C functions take (a
launch, the encoding of a TMA descriptor) is not in it.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import autotuner, jit
from triton.runtime.driver import driver

from benchmarks.cuda.cases import QWEN3, Experts
from benchmarks.cuda.lmdeploy import MOE, LMDeploy
from epbackend.device.cuda import CudaDevice
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels import ExpertWeights, Kernels
from epbackend.kernels.triton.kernels import TritonKernels
from epbackend.kernels.triton.tiles import H100
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

CALLS, TURNS = 20, 40
NO_LAUNCH = ("empty", "new_empty", "view", "slice", "select", "item", "flatten", "unflatten")
"""Operators of torch that launch nothing on a GPU, by the beginning of their names."""


class StubbedDriver:
    """A Triton driver of a GPU that computes nothing; `launched` counts by kernel."""

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.encoded = 0
        """TMA descriptors."""
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": H100.shared_bytes},
            fill_tma_descriptor_tiled=self._encode,
            build_signature_metadata=lambda signature: b"",
            launch=self._launch,
        )
        self.launcher_cls = nvidia.CudaLauncher

    def _launch(self, _x: int, _y: int, _z: int, _stream: int, function: str, *_: Any) -> None:
        self.launched[function] += 1

    def _encode(self, *_: Any) -> bytes:
        self.encoded += 1
        return b""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed_gpu() -> Iterator[StubbedDriver]:
    """Inside, an H100 is there by name, and device `cuda` takes the CPU's tensors."""
    stub, before = StubbedDriver(), driver._active
    driver.set_active(stub)
    argument: Any = lambda **said: said
    with (
        mock.patch.multiple(nvidia, PyKernelArg=argument, ARG_CONSTEXPR=0, ARG_KERNEL=1, ARG_TUPLE=2),
        mock.patch.object(CudaDevice, "unavailable", lambda device: None),
        mock.patch.object(CudaDevice, "kernel_set", lambda device, name="auto": TritonKernels(H100)),
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
        if not name.startswith(NO_LAUNCH) and not name.startswith("to."):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


def our_layer(experts: Experts, weights: ExpertWeights) -> ExpertParallelMoE:
    return ExpertParallelMoE(
        weights.gate_up,
        weights.down,
        slot_map=SlotMap.uniform(experts.slots, 1),
        ranks=RankGroup.single(),
        settings=DispatchSettings(),
        top_k=experts.top_k,
        device="cuda",
    )


@contextmanager
def on_hopper(lmdeploy: LMDeploy) -> Iterator[None]:
    """Inside, LMDeploy's kernels take the way that they take on a Hopper GPU, with the first of their tiles."""
    from importlib import import_module

    moe = import_module(f"{MOE}.fused_moe")
    activation = import_module("lmdeploy.pytorch.kernels.cuda.activation")
    props = {"multi_processor_count": H100.sms, "warps_per_sm": 64}
    kernel = moe.fused_moe_kernel
    with (
        mock.patch.object(moe, "_supports_single_cta_route_prepare", lambda ids: True),
        mock.patch.object(moe, "_supports_compact_moe", lambda *given: True),
        mock.patch.object(activation, "get_device_props", lambda device: props),
        mock.patch.object(kernel, "configs", kernel.configs[:1]),
    ):
        yield


def calls(experts: Experts, tokens: int, lmdeploy: LMDeploy | None) -> dict[str, Callable[[], Tensor]]:
    """Who -> one call of the same layer."""
    weights = ExpertWeights(
        torch.empty(experts.slots, 2 * experts.F, experts.D, dtype=torch.bfloat16),
        torch.empty(experts.slots, experts.D, experts.F, dtype=torch.bfloat16),
    )
    hidden_TD = torch.zeros(tokens, experts.D, dtype=torch.bfloat16)
    scores = torch.rand(tokens, experts.slots).softmax(-1).topk(experts.top_k)
    weights_TK, ids_TK = scores.values, scores.indices
    layer = our_layer(experts, weights)
    phase = "decode" if tokens <= 256 else "prefill"

    def ours() -> Tensor:
        return layer(hidden_TD, ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True), phase=phase)

    def theirs() -> Tensor:
        assert lmdeploy
        return lmdeploy.half(hidden_TD, weights, weights_TK, ids_TK, renormalize=True)

    return {"epbackend": ours} | ({"LMDeploy": theirs} if lmdeploy else {})


def least_us(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) * 1e6 / CALLS


def measure(experts: Experts, tokens: int, lmdeploy: LMDeploy | None, stub: StubbedDriver, prof=False):
    both = calls(experts, tokens, lmdeploy)
    rows = {}
    for who, call in both.items():
        call()  # compiles
        stub.launched.clear()
        stub.encoded = 0
        with TorchLaunches() as torchs:
            call()
        rows[who] = {
            "tokens": tokens,
            "by": who,
            "launches": dict(stub.launched) | {f"torch {n}": c for n, c in torchs.launched.items()},
            "descriptors": stub.encoded,
            "us": float("inf"),
        }
    for _ in range(TURNS):
        for who, call in both.items():
            rows[who]["us"] = min(rows[who]["us"], least_us(call))
    if prof:
        for who, call in both.items():
            with cProfile.Profile() as seen:
                for _ in range(500):
                    call()
            print(who, tokens)
            pstats.Stats(seen).sort_stats("tottime").print_stats(35)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.host")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 1024])
    parser.add_argument("--lmdeploy", type=Path)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lmdeploy = LMDeploy.found(asked.lmdeploy)
    with stubbed_gpu() as stub, on_hopper(lmdeploy), torch.inference_mode():
        for tokens in asked.tokens:
            for row in measure(QWEN3, tokens, lmdeploy, stub, asked.profile):
                print(row)


if __name__ == "__main__":
    main()
