"""How the ranks of one program find their devices, as far as it comes without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from epbackend.config import EPConfig
from epbackend.device import cpu_group
from epbackend.device.cuda import CudaDevice
from epbackend.engines.torchrun import join
from epbackend.errors import ConfigError
from tests.helpers.pretended_gpu.sitecustomize import pretend

pytest.importorskip("triton", reason="triton is not installed")

TWO = EPConfig.load({"device": "cuda", "ep_size": 2, "engine": {"dp": 2}})


class MetError(Exception):
    """The ranks would meet now."""


@pytest.fixture
def done(monkeypatch):
    """What is done on a machine of two GPUs before the ranks meet, where none of them can."""
    calls = []

    def meet(backend: str) -> None:
        calls.append(backend)
        raise MetError

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pretend(monkeypatch.setattr)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(CudaDevice, "no_collectives", lambda self: None)
    monkeypatch.setattr(dist, "init_process_group", meet)
    monkeypatch.setenv("RANK", "3")
    return calls


def test_a_rank_takes_its_own_gpu_before_the_ranks_meet(done, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(MetError):
        join(TWO)
    assert done == [torch.device("cuda", 1), "nccl"]


@pytest.mark.parametrize(
    ("local_rank", "said"),
    [
        ("2", r"rank 2 of this machine sees 2 of them; start as many ranks here .*CUDA_VISIBLE_DEVICES"),
        (None, r"LOCAL_RANK, .*, is not set; start the script by torchrun"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused(done, monkeypatch, local_rank, said):
    """Else it would share the first one."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ConfigError, match=said):
        join(TWO)
    assert done == []


def test_a_rank_on_a_cpu_takes_no_device(done, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(MetError):
        join(EPConfig.load({"device": "cpu", "ep_size": 2}))
    assert done == [cpu_group.NAME]
