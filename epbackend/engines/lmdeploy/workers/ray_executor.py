"""LMDeploy's Ray executor, watched, and on CPUs too. Imports ray, which takes 2 s: only where ray runs the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import torch.distributed as dist
from lmdeploy.pytorch import ray as cluster
from lmdeploy.pytorch.devices import get_device_manager
from lmdeploy.pytorch.engine.executor.ray_executor import RayExecutor, RayWorkerWrapper

from epbackend.dispatch.running_time import RunningTime
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.load.report import (
    PATIENCE_S,
    Counted,
    all_rows,
    record_error,
)
from epbackend.engines.lmdeploy.plug import set_threads
from epbackend.engines.lmdeploy.processes import ENGINE_VARIABLE
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.lmdeploy.workers.process_guard import (
    ENDED,
    descendants,
    process_state,
    started_heed_signals,
)
from epbackend.engines.lmdeploy.workers.rank_watch import (
    LOOK_S,
    RankState,
    judge,
    look_at,
)
from epbackend.errors import ConfigError, WorkerError

logger = logging.getLogger("lmdeploy")

CPU_RESOURCE = "epbackend_cpu_rank"
"""One of these a rank: Ray allows no placement by its own CPU resource."""

START = {
    "GPU": "ray start --head --num-gpus {}",
    "NPU": "ray start --head --resources '{{\"NPU\": {}}}'",
}
"""What Ray calls a device -> the command that starts it with so many."""

SERVERS = {"gcs_server": "control store, gcs_server", "raylet": "raylet"}
"""Processes of Ray, without which it cannot go on -> what the log calls them."""
OBJECT_STORE_BYTES = 512 << 20
COUNTS_LOOK_S = 0.05
"""Between two looks whether a reader asks for the load of ranks on other machines."""
COUNTS_EVERY_S = 1.0
"""How often it is fetched without a question."""


class PluggedRayWorker(RayWorkerWrapper):
    """A Ray actor. Pickled by reference, so that creating it imports the plug in its process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        plug.enable_worker()
        set_threads()
        _choose_interface()
        super().__init__(*args, **kwargs)

    def warmup_dist(self) -> None:
        """Brings the ranks together once; LMDeploy's own way reduces a tensor on 'cuda'."""
        if self.device_type == "cpu":
            dist.barrier()
        else:
            super().warmup_dist()

    def start(self) -> None:
        active().pulse.start(self.rank)
        super().start()

    def counted(self, since: int) -> Counted | None:
        """See `StatsWriter`; between two steps, in the thread that runs them."""
        return active().stats_writer.counted(since)

    async def wait_tasks(self) -> None:
        try:
            await super().wait_tasks()
        except Exception as error:
            record_error(self.rank, _cause_of(error))
            raise


class WatchedRayExecutor(RayExecutor):
    """The engine's end: fails, naming the rank, when one on this machine has ended or does not move on.

    A rank on another machine ends by itself when it is stuck, and Ray tells that it did. Of a Ray that this process
    started the servers are watched too: its clients try for a minute to reach a lost control store, and then end.
    """

    _failed = False

    def start(self, forward_event: asyncio.Event) -> None:
        super().start(forward_event)
        self._released, self._running = threading.Event(), RunningTime()
        started = {each.pid: each.name() for each in descendants(os.getpid())}
        self._servers = {pid: name for pid, name in started.items() if name in SERVERS}
        active().suspect = lambda: self._verdict(failed=True)
        for what, name in ((self._watch, "epbackend-watch"), (self._fetch_counts, "epbackend-counts")):
            threading.Thread(target=what, name=name, daemon=True).start()

    async def wait_tasks(self) -> None:
        """Fails as soon as a rank does: LMDeploy's own tells its clients after it has waited for all to be closed."""
        try:
            await super().wait_tasks()
        except Exception as error:
            self._fail(self._verdict(failed=True) or _cause_of(error))
            raise

    def stop(self) -> None:
        if not self._failed:
            super().stop()

    def release(self) -> None:
        if hasattr(self, "_released"):  # it had started
            self._released.set()
        if self._failed:
            for worker in self.workers:
                ray.kill(worker)
            self.ray_ctx.shutdown()
        else:
            super().release()

    def _fetch_counts(self) -> None:
        """Brings what ranks on other machines count into the load report, every second and when a reader asks."""
        rows = all_rows()
        if rows is None:
            return
        # A rank of this machine has written its process down when it started.
        far = {
            rank: each for rank, each in zip(self._own, self.workers, strict=True) if not rows["pid"][rank]
        }
        ranks, due = list(far), 0.0
        rows["writer"][ranks] = os.getpid()
        while far and not self._released.wait(COUNTS_LOOK_S):
            asked, now = rows["asked"][ranks].copy(), time.monotonic()
            if now < due and (asked == rows["answered"][ranks]).all():
                continue
            try:
                told = ray.get(
                    [each.counted.remote(int(rows["steps"][rank])) for rank, each in far.items()],
                    timeout=PATIENCE_S,
                )
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:  # one is lost: the watch tells it
                break
            for rank, counted in zip(ranks, told, strict=True):
                if counted is not None:
                    counted.write(rows[rank])
            rows["answered"][ranks], due = asked, now + COUNTS_EVERY_S
        rows["writer"][ranks] = 0

    def _watch(self) -> None:
        text = None
        while text is None:
            if self._released.wait(LOOK_S):
                return
            self._running.look()
            text = self._verdict()
        self._fail(text)

    def _verdict(self, *, failed: bool = False) -> str | None:
        """Who is at fault: a server of Ray's, without which ranks end as well, before any rank. See `judge`."""
        for pid, name in self._servers.items():
            if process_state(pid) in ENDED:
                return f"Ray's {SERVERS[name]} (process {pid}) has ended"
        return judge(self._ranks(), active().config.timeout_s, failed=failed)

    def _fail(self, text: str) -> None:
        """Ends the engine. No rank is asked for anything any more: Ray waits for one that does not answer."""
        if self._failed:
            return
        self._failed = True
        elsewhere = [str(each.rank) for each in self._ranks() if not each.process]
        hint = f" Ranks on other machines, perhaps cut off: {', '.join(elsewhere)}." if elsewhere else ""
        failure = WorkerError(f"{text}.{hint} The other ranks were stopped; the log above tells more.")
        logger.error(str(failure))
        # Ray waits without end for one that is stopped.
        for rank in self._ranks():
            if rank.own and rank.process and not rank.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process, signal.SIGKILL)
        active().engine_failed(failure)

    @property
    def _own(self) -> range:
        """The ranks of this engine."""
        first = self.dist_config.dp_rank * self.dist_config.attn_tp
        return range(first, first + self.dist_config.attn_tp)

    def _ranks(self) -> list[RankState]:
        """Of all engines: which one is at fault, the own ones alone do not show."""
        return [
            look_at(rank, self._running, own=rank in self._own) for rank in range(active().config.world_size)
        ]


def _cause_of(error: Exception) -> str:
    cause = getattr(error, "cause", error)  # Ray's error holds the worker's whole traceback
    return f"{type(cause).__name__}: {cause}"


def resource_of(original: Callable) -> Callable:
    """`get_device_str` that knows the CPU too."""

    def get_device_str(device_type: str | None = None) -> str:
        device_type = device_type or get_device_manager().current_context().device_type
        return CPU_RESOURCE if device_type == "cpu" else original(device_type)

    return get_device_str


def private_cluster(original: Callable) -> Callable:
    """`init_ray_cluster` that starts a cluster of ours where the ranks run on CPUs and no cluster is named.

    In one that RAY_ADDRESS names, the engines that one process started are spread over the machines. LMDeploy pins each
    to the machine of its own process, which is the same for all of them.
    """

    def init_ray_cluster(
        world_size: int, ray_address: str | None = None, dp: int = 1, device_type: str = "cuda"
    ) -> Any:
        users = ray.is_initialized()
        try:
            if device_type == "cpu":
                with started_heed_signals():
                    _start_cluster(world_size, ray_address)
            if "RAY_ADDRESS" not in os.environ:
                return original(world_size, ray_address, dp, device_type)
            ray.init(address=ray_address, ignore_reinit_error=True)
            resource = cluster.get_device_str(device_type)
            _check_room(resource, world_size)
            with _pinned_to(_node_of(int(os.environ.get(ENGINE_VARIABLE, 0)), world_size, resource)):
                return original(world_size, ray_address, dp, device_type)
        except ConfigError:
            if not users:  # the next try shall find what was started meanwhile
                ray.shutdown()
            raise

    return init_ray_cluster


def room_is_checked(original: Callable) -> Callable:
    """`_wait_until_pg_ready` that waits for devices in use, and not for such as Ray has not got."""

    def wait_until_pg_ready(group: Any) -> None:
        wanted = Counter[str]()
        for bundle in group.bundle_specs:
            wanted.update(bundle)
        room = ray.cluster_resources()
        for resource in wanted.keys() & START:
            if room.get(resource, 0) < wanted[resource]:
                ray.util.remove_placement_group(group)
                ranks = int(wanted[resource])
                raise ConfigError(
                    f"engine.executor: ray: an engine's {ranks} ranks take {ranks} {resource}, and Ray has found "
                    f"{int(room.get(resource, 0))}: start it with them before ({START[resource].format(ranks)}), or "
                    "use engine.executor: mp, which takes engine.dp: 1"
                )
        original(group)

    return wait_until_pg_ready


def _check_room(resource: str, ranks: int) -> None:
    """LMDeploy waits half an hour for a cluster that has room, and five minutes for ranks that meet where none is.

    Raises:
        ConfigError: the cluster has no room for all ranks, or this machine has none for the first engine's `ranks`.
    """
    config, room = active().config, int(ray.cluster_resources().get(resource, 0))
    if room < config.world_size:
        raise ConfigError(
            f"ep_size, engine.dp and engine.tp ask for {config.world_size} ranks, and the cluster at RAY_ADDRESS has "
            f"{room} {resource}: start ray on more machines (ranks on CPUs: --resources '{{\"{CPU_RESOURCE}\": 2}}')"
        )
    here = ray.util.get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["NodeManagerAddress"] == here and node["Alive"]]
    own_room = int(sum(node["Resources"].get(resource, 0) for node in nodes))
    if not own_room or _node_of(0, ranks, resource) != here:
        raise ConfigError(
            f"engine.executor: ray: the ranks meet on this machine ({here}), so the first engine's {ranks} must begin "
            f"here, and its Ray offers {own_room} {resource}: run this command on a machine of the cluster that has "
            f"room, or start Ray here with it (ranks on CPUs: --resources '{{\"{CPU_RESOURCE}\": {ranks}}}')"
        )
    if config.balance.on and own_room < config.world_size:
        raise ConfigError(
            "balance.on moves experts within one machine, and this one has no room for all ranks: turn it off"
        )


def _node_of(engine: int, ranks: int, resource: str) -> str:
    """The address of the machine for this engine: this one is filled first, then the others."""
    here = ray.util.get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for node in sorted(nodes, key=lambda node: (node["NodeManagerAddress"] != here, node["NodeID"])):
        engines = int(node["Resources"].get(resource, 0)) // ranks
        if engine < engines:
            return node["NodeManagerAddress"]
        engine -= engines
    return here  # none has room for a whole engine: Ray spreads its ranks


@contextmanager
def _pinned_to(address: str) -> Iterator[None]:
    """LMDeploy pins an engine's first rank to the machine that it takes for its own."""
    found = ray.util.get_node_ip_address
    ray.util.get_node_ip_address = lambda _=None: address
    try:
        yield
    finally:
        ray.util.get_node_ip_address = found


def _choose_interface() -> None:
    """gloo uses the interface by which Ray's other machines reach this one, unless the user names one.

    By itself it takes what the host's name stands for, often the loopback interface, where no other machine finds it.
    """
    address = ray.util.get_node_ip_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _start_cluster(ranks: int, address: str | None) -> None:
    """Starts Ray on this machine for so many ranks, unless it runs or the user named a cluster.

    A cluster of ours is a private one, never one that another process happens to run.
    """
    if ray.is_initialized() or address is not None or "RAY_ADDRESS" in os.environ:
        return
    # Ray would write a key of its own into the home, which containers do not have.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=ranks,
        resources={CPU_RESOURCE: ranks},
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
