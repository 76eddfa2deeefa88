"""The loads of a real run as a file that placements are planned on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from epbackend.balance.recording import EVERY_S
from epbackend.checkpoint import layer_count, read_model_config
from epbackend.engines.lmdeploy.processes import POLL_S, listens
from epbackend.engines.load_report import LoadReport
from epbackend.errors import ConfigError, EPError
from epbackend.files import check_target, replace_file
from epbackend.placement.formats.sglang import loads_bytes
from epbackend.placement.loads import Loads
from epbackend.placement.renumbering import Renumbering, numbering_of

logger = logging.getLogger("epbackend")


@dataclass(frozen=True)
class Recording:
    """A file for the loads of one model."""

    path: Path
    layers: int
    """Of the model, dense ones too."""
    ep_size: int
    numbering: str
    """By whose numbers experts are counted (see `placement.renumbering`)."""

    @classmethod
    def of(cls, path: Path, model_path: str, ep_size: int) -> Recording:
        """Raises ConfigError where nothing could be written, or the model does not say how many layers it has."""
        layers = layer_count(read_model_config(Path(model_path)))
        if layers is None:
            raise ConfigError(f"record: {model_path} does not say how many layers it has (num_hidden_layers)")
        check_target("record", path)
        return cls(path, layers, ep_size, numbering_of(Renumbering.beside(model_path)))

    def write(self, report: LoadReport) -> None:
        """Replaces the file in one operation.

        Raises:
            EPError: no expert has had a token, or the file cannot be written.
        """
        if not report.tokens_RYE.any():
            raise EPError(f"{self.path}: nothing to record, no expert has had a token")
        loads = Loads.of(report.loads_YE(self.layers, self.ep_size), [self.path.stem], self.numbering)
        replace_file(self.path, loads_bytes(loads))


@contextmanager
def recording_server(
    recording: Recording | None, report: Callable[[], LoadReport], addresses: Sequence[tuple[str, int]]
) -> Iterator[None]:
    """Records what engines do while the block runs: every EVERY_S seconds, and at its end. None: does nothing.

    Counts from when their servers listen at `addresses`.
    """
    if recording is None:
        yield
        return
    stop = threading.Event()
    recorder = threading.Thread(target=_record, args=(recording, report, addresses, stop), daemon=True)
    recorder.start()
    try:
        yield
    finally:
        stop.set()
        recorder.join()


def _record(
    recording: Recording,
    report: Callable[[], LoadReport],
    addresses: Sequence[tuple[str, int]],
    stop: threading.Event,
) -> None:
    while not all(map(listens, addresses)):
        if stop.wait(POLL_S):
            return
    start = report()
    logger.info("%s: expert loads are counted from now on", recording.path)
    while not stop.is_set():
        stop.wait(EVERY_S)
        done = report().since(start)
        if stop.is_set() or done.tokens_RYE.any():
            try:
                recording.write(done)
            except EPError as error:
                logger.error(str(error))
