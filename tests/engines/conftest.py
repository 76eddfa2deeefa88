"""Models and their reference answers, made once; processes that end with their test; a certificate."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from epbackend.device.cuda import CudaDevice
from epbackend.engines.lmdeploy import disable
from epbackend.engines.lmdeploy.processes import LOOPBACK
from tests.helpers import engine_models as models
from tests.helpers import processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """form -> folder of the model of that form."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda form: models.save(form, folder))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    """form -> Hugging Face's greedy tokens for `models.prompts()`."""
    return cache(lambda form: models.greedy_tokens(checkpoint(form), models.prompts()))


@pytest.fixture(scope="session")
def cuda() -> CudaDevice:
    """Device cuda, its kernels interpreted or on a GPU; skips with its own reason where it cannot be used."""
    device = CudaDevice()
    if reason := device.unavailable():
        pytest.skip(f"cuda: {reason}")
    return device


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., processes.Running]]:
    """`processes.start` in a folder of its own; whatever still runs at the end of the test is killed."""
    started: list[processes.Running] = []

    def start(script: str, *arguments: str, **options: Any) -> processes.Running:
        started.append(processes.start(tmp_path, script, *arguments, **options))
        return started[-1]

    yield start
    for running in started:
        running.kill()


@pytest.fixture(autouse=True)
def _unplugged() -> Iterator[None]:
    """No test leaves the plug enabled for the next."""
    yield
    disable()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate of this machine's own."""
    key, cert = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", f"subjectAltName=IP:{LOOPBACK}", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert
