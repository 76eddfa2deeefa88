"""Two machines on one: network namespaces joined by a cable, each with its own processes, /dev/shm, /tmp and name."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

import psutil

from tests.helpers.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
RAY_PORT = 6379
_OWN_FOLDERS = (
    "mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /tmp && hostname {name} && exec sleep infinity"
)


def why_not() -> str | None:
    """Why this machine cannot pretend to be two; None where it can."""
    try:
        probe = subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return None if probe.returncode == 0 else "namespaces need root"


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    init: int
    """The process that keeps its namespaces."""
    environment: dict[str, str]

    def start(self, *command: str) -> Popen[str]:
        """Starts a command on this machine, in the project's folder; its output is one pipe."""
        inside = ["nsenter", f"--target={self.init}", "--net", "--mount", "--uts", "--pid", f"--wd={ROOT}"]
        return Popen([*inside, *command], env=self.environment, stdout=PIPE, stderr=STDOUT, text=True)

    def cut_off(self) -> None:
        """Pulls its cable."""
        _run("ip", "-n", self.name, "link", "set", "cable", "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both machines; all that runs on them is killed at the end."""
    tag = f"ep{os.getpid()}"
    names = [f"{tag}a", f"{tag}b"]
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"10.77.0.1:{RAY_PORT}",
        "PYTHONPATH": str(ROOT),
    }
    keepers = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        cable = ["type", "veth", "peer", "name", "cable", "netns", names[1]]
        _run("ip", "link", "add", "cable", "netns", names[0], *cable)
        hosts = []
        for number, name in enumerate(names, start=1):
            address = f"10.77.0.{number}"
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _run("ip", "-n", name, "link", "set", device, "up")
            own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
            keep = ["ip", "netns", "exec", name, *own, "sh", "-c", _OWN_FOLDERS.format(name=name)]
            keepers.append(Popen(keep, stdout=DEVNULL))
            hosts.append(Host(name, address, _child_of(keepers[-1].pid), environment))
        yield hosts[0], hosts[1]
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=DEVNULL)


def start_ray(host: Host, resources: dict[str, int], head: Host | None = None) -> None:
    """A node of a Ray cluster, its head where no other one is named. Returns when it is up."""
    place = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
    if head is not None:
        place = [f"--address={head.address}:{RAY_PORT}"]
    limits = ["--num-cpus=4", "--object-store-memory=200000000", f"--resources={json.dumps(resources)}"]
    node = host.start(RAY, "start", *place, f"--node-ip-address={host.address}", *limits)
    said, _ = node.communicate(timeout=PATIENCE_S)
    assert node.returncode == 0, said


def _child_of(pid: int) -> int:
    """Its only descendant that has none: `ip netns exec` becomes unshare, which starts the namespace's init."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        children = psutil.Process(pid).children()
        if children and children[0].name() == "sleep":
            return children[0].pid
        time.sleep(0.05)
    raise AssertionError("the machine has not come up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
