"""Our own log in the processes that start engines or are one."""

from __future__ import annotations

import logging


class ShownLog:
    """What epbackend logs from a level on, on stderr unless the program has a place for it; `close` ends it."""

    def __init__(self, level: str) -> None:
        self._log = logging.getLogger("epbackend")
        self._level_before = self._log.level
        self._log.setLevel(level)
        self._handler: logging.Handler | None = None
        if not self._log.hasHandlers():
            self._handler = logging.StreamHandler()
            self._handler.setFormatter(
                logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s")
            )
            self._log.addHandler(self._handler)

    def close(self) -> None:
        self._log.setLevel(self._level_before)
        if self._handler is not None:
            self._log.removeHandler(self._handler)

    def __enter__(self) -> ShownLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
