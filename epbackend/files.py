"""Files that are written: whether one can be, before the work for it; whole or not at all. JSON that is read."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from epbackend.errors import ConfigError


def check_target(option: str, path: Path) -> None:
    """Raises ConfigError where `replace_file` could not write: before the work, whose results would be lost.

    Folders that are missing are made later; that of an old file is needed, as the new one is made beside it.
    """
    place = path.absolute()
    there = next(each for each in (place, *place.parents) if os.path.exists(each))
    needed = [there] if there != place or _written_as_it_is(place) else [there, there.parent]
    taken = there.is_dir() if there == place else not there.is_dir()
    if taken or not all(os.access(each, os.W_OK) for each in needed):
        raise ConfigError(
            f"{option}: {path} cannot be written; name a file, in a folder that you may write to"
        )


def check_apart(written: Mapping[str, Path | None], read: Mapping[str, Iterable[Path]]) -> None:
    """Raises ConfigError where an option would write over what another option writes or reads: both by their names."""
    owners = {path.resolve(): f"is given to {name} as well" for name, paths in read.items() for path in paths}
    for option, path in written.items():
        if path is None or (path.exists() and not path.is_file()):  # /dev/stdout may take several
            continue
        if path.resolve() in owners:
            raise ConfigError(f"{option}: {path} {owners[path.resolve()]}; name another file")
        owners[path.resolve()] = f"is --{option} as well"


def replace_file(path: Path, content: bytes) -> None:
    """Writes the file in one operation: a reader finds the old one or the new one, also where this fails.

    Folders that are missing are made. What is no file by itself, as /dev/stdout, a pipe or a link, is written to as it
    is.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _written_as_it_is(path):
            path.write_bytes(content)
            return
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _written_as_it_is(path: Path) -> bool:
    return os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path))


def read_json(option: str, path: Path) -> Any:
    """What is in the file. Raises ConfigError, with the option, where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option}: {path} is not JSON: {error}") from None


def cache_folder() -> Path:
    """Where measurements are kept, in the user's cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epbackend"
