"""Files that are written: whether one can be, before the work for it; whole or not at all; and the user's cache."""

import os
from pathlib import Path

from epbackend.errors import ConfigError


def check_target(option: str, path: Path, replaced: bool = False) -> None:
    """Raises ConfigError where no file could be written there: before the work, whose results would be lost.

    Folders that are missing are made later. `replaced`: by `replace_file`, which needs the folder of an old file too.
    """
    place = path.absolute()
    there = next(each for each in (place, *place.parents) if os.path.exists(each))
    needed = [there, there.parent] if replaced and there == place else [there]
    taken = there.is_dir() if there == place else not there.is_dir()
    if taken or not all(os.access(each, os.W_OK) for each in needed):
        raise ConfigError(
            f"{option}: {path} cannot be written; name a file, in a folder that you may write to"
        )


def replace_file(path: Path, content: bytes) -> None:
    """Writes the file in one operation: a reader finds the old one or the new one, also where this fails.

    Folders that are missing are made.

    Raises:
        ConfigError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def cache_folder() -> Path:
    """Where measurements are kept, in the user's cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epbackend"
