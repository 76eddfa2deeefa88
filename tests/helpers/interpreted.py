"""LMDeploy's engine on the CPU with the experts of the CUDA plug, which Triton interprets there."""

from __future__ import annotations

from typing import Any

import pytest

from epbackend.engines.lmdeploy import operators
from epbackend.engines.lmdeploy.operators import expert_operator
from epbackend.engines.lmdeploy.workers import mp


def with_cuda_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes engines that are started from now on compute their experts by the CUDA kernels, in every process."""
    monkeypatch.setattr(operators, "expert_operator", _cuda_operator)
    monkeypatch.setattr(mp, "GuardedProc", InterpretedProc)


def _cuda_operator(spec: Any, device: str) -> Any:
    return expert_operator(spec, "cuda")


class InterpretedProc(mp.GuardedProc):
    """A rank."""

    def _main_loop(self, *args: Any, **kwargs: Any) -> None:
        operators.expert_operator = _cuda_operator
        super()._main_loop(*args, **kwargs)
