"""The processes that LMDeploy starts for device cuda, as far as they come without a GPU: really spawned ones.

What asks torch for a GPU is answered by `pretended_gpu`, Triton interprets; the rest is LMDeploy's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lmdeploy.pytorch.check_env.dist import DistChecker
from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
from lmdeploy.pytorch.engine import engine as lmdeploy_engine
from lmdeploy.pytorch.engine.config_builder import ConfigBuilder

import epbackend
from epbackend import EPConfig
from epbackend.device.base import Memory
from epbackend.device.cuda import CudaDevice
from epbackend.dispatch.context import GroupContext
from epbackend.engines.lmdeploy import plug, state
from epbackend.engines.lmdeploy.checks import check_cache
from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
from epbackend.engines.lmdeploy.patches.engine import steps_are_counted
from epbackend.engines.lmdeploy.plug import set_threads
from epbackend.errors import ConfigError, WorkerError
from tests.helpers.pretended_gpu.sitecustomize import pretend
from tests.helpers.processes import engine_workers

pytestmark = pytest.mark.cuda
PRETENDED = Path(__file__).parents[1] / "helpers" / "pretended_gpu"


def two_ranks(**engine) -> EPConfig:
    return EPConfig.load({"device": "cuda", "ep_size": 2, "engine": {"session_len": 64} | engine})


@pytest.fixture
def pretended(cuda, monkeypatch):
    """A GPU in this process and in those that it spawns."""
    if not cuda.emulated:
        pytest.skip("with a GPU, tests/e2e starts whole engines")
    path = os.pathsep.join(filter(None, [str(PRETENDED), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    pretend(monkeypatch.setattr)


def test_what_a_check_in_a_process_of_its_own_finds_is_said_here(pretended, checkpoint):
    config = two_ranks(extra={"thread_safe": True})
    plug.enable(config)
    settings = ConfigBuilder.update_engine_config(engine_config(config))
    checker = lmdeploy_engine.EngineChecker(str(checkpoint("qwen3-moe")), settings)
    with pytest.raises(ConfigError, match=r"check of Engine failed: thread safe mode is no longer supported"):
        checker.handle()


def test_a_cache_beyond_the_devices_memory_is_found_where_the_device_is_asked(
    pretended, checkpoint, monkeypatch
):
    """In a process that ends, so that this one takes no memory of a GPU; before any weight is loaded."""
    monkeypatch.setattr(CudaDevice, "memory", lambda self, rank=0: pytest.fail("it is asked in this process"))
    with pytest.raises(ConfigError, match=r"engine\.cache_gb: 1e\+06 GiB a rank.*: not enough memory"):
        epbackend.pipeline(str(checkpoint("qwen3-moe")), two_ranks(cache_gb=1e6))
    assert engine_workers() == []


def test_the_fullest_device_of_the_machine_decides(pretended, monkeypatch):
    """GPUs of one's own may be in use by others; those that no rank gets may be full."""
    free = [8 << 30, 2 << 30, 0]
    monkeypatch.setattr(CudaDevice, "torch_device", lambda self, rank: torch.device("cuda", rank))
    monkeypatch.setattr(CudaDevice, "memory", lambda self, rank=0: Memory(80 << 30, free[rank]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    with pytest.raises(ConfigError, match=r"4 GiB a rank: .*1\.80 GiB are free on cuda:1"):
        check_cache(two_ranks(cache_gb=4))
    check_cache(two_ranks(cache_gb=1))


def test_a_pipeline_of_two_ranks_comes_as_far_as_nccl(pretended, checkpoint, monkeypatch):
    """Its checks would demand DeepEP, and its workers not say what they failed of, where the plug is not."""
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has NCCL, which would look for a GPU")
    monkeypatch.setattr(DistChecker, "check", lambda self: pytest.fail("it is checked in this process"))
    with pytest.raises(WorkerError, match=r"rank [01] failed: RuntimeError: .*NCCL"):
        epbackend.pipeline(str(checkpoint("qwen3-moe")), two_ranks())
    assert engine_workers() == []


def test_ray_workers_on_gpus(pretended, monkeypatch):
    """LMDeploy asks Ray for GPUs, and starts our class with our config."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    plug.enable(two_ranks(dp=2))
    from lmdeploy.pytorch import ray as cluster
    from lmdeploy.pytorch.engine.executor import ray_executor

    from epbackend.engines.lmdeploy.workers.ray_executor import PluggedRayWorker

    started = []

    def remote(**options):
        return lambda kind: SimpleNamespace(remote=lambda **arguments: started.append((kind, options)))

    monkeypatch.setattr(ray, "remote", remote)
    executor = object.__new__(ray_executor.RayExecutor)
    executor.dist_config = SimpleNamespace(attn_tp=1)
    executor._needs_symm_mem_device_setup = False
    executor.workers = ["a worker"]
    bundles = SimpleNamespace(bundle_specs=[{"CPU": 1.0}, {cluster.get_device_str("cuda"): 1.0}])
    with get_device_manager().context(DeviceContext("cuda")):
        executor._init_workers_ray(bundles, {})
    ((kind, options),) = started
    assert issubclass(kind, PluggedRayWorker)
    assert options["num_gpus"] > 0
    assert options["runtime_env"]["env_vars"][state.CONFIG_VARIABLE] == two_ranks(dp=2).to_json()

    monkeypatch.setattr(executor, "_sort_workers", lambda address, workers: workers[::-1], raising=False)
    monkeypatch.setattr(ray_executor, "_get_master_addr", lambda: "127.0.0.1")
    executor.workers = [0, 1]
    executor._init_distributed_environment_by_device("cuda")
    assert executor.workers == [1, 0]


def test_ray_workers_meet_in_lmdeploys_way_on_gpus(pretended, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    from lmdeploy.pytorch.engine.executor.ray_executor import RayWorkerWrapper

    from epbackend.engines.lmdeploy.workers.ray_executor import PluggedRayWorker

    met = []
    monkeypatch.setattr(RayWorkerWrapper, "warmup_dist", lambda self: met.append(self.device_type))
    worker = object.__new__(PluggedRayWorker)
    worker.device_type = "cuda"
    worker.warmup_dist()
    assert met == ["cuda"]


@pytest.mark.slow
def test_gpus_that_ray_does_not_know(pretended, monkeypatch):
    """LMDeploy would wait for half an hour; Ray ends again, so that the next try finds one started meanwhile."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of a test")  # else Ray writes one into the home
    plug.enable(two_ranks(executor="ray"))
    from lmdeploy.pytorch import ray as cluster

    with pytest.raises(
        ConfigError, match=r"2 ranks take 2 GPU, and Ray has found 0.*ray start --head --num-gpus 2"
    ):
        cluster.init_ray_cluster(2, ray_address="local", device_type="cuda")
    assert not ray.is_initialized()


def test_an_engine_in_a_ray_actor_is_refused(pretended):
    """It would run LMDeploy's own experts, or fail for want of DeepEP."""
    config = two_ranks(extra={"mp_engine_backend": "ray", "enable_mp_engine": True})
    plug.enable(config)
    with pytest.raises(ConfigError, match=r"engine\.extra\.mp_engine_backend.*remove it"):
        lmdeploy_engine.Engine.from_pretrained("a model", engine_config=engine_config(config))


@pytest.mark.parametrize(("ranks", "watched"), [(1, []), (2, ["a step of the engine"])])
def test_a_step_is_watched_where_a_rank_can_be_lost(pretended, monkeypatch, ranks, watched):
    seen = []
    monkeypatch.setattr(GroupContext, "watch", lambda self, what, group, timeout_s: seen.append(what))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    plug.enable(EPConfig.load({"device": "cuda", "ep_size": ranks}))
    assert steps_are_counted.build(lambda stream: "output")() == "output"
    assert seen == watched


def test_host_threads_are_left_alone(pretended, monkeypatch):
    """A rank on a CPU takes its share of the cores; one on a GPU only what it is told to."""
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    plug.enable(two_ranks())
    set_threads()
    plug.disable()
    plug.enable(two_ranks(threads_per_rank=3))
    set_threads()
    assert given == [3]


def test_device_cpu_beside_a_gpu_is_refused(pretended):
    """It stands in for torch.cuda, which a GPU needs."""
    with pytest.raises(ConfigError, match=r"device: cpu .*set CUDA_VISIBLE_DEVICES=''"):
        plug.enable(EPConfig.load({"device": "cpu"}))
