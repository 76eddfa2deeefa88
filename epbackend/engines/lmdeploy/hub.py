"""Where a model's files are."""

from __future__ import annotations

import re
from pathlib import Path

from epbackend.errors import UnavailableError
from epbackend.models import resolve

HUB_NAME = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+")
"""owner/name"""


def locate(model: str) -> str:
    """The directory of a model: one that comes with epbackend, a path, or the name of one in the hub.

    A model of the hub is downloaded, as LMDeploy does it, unless it is in the hub's cache already.

    Raises:
        UnavailableError: it could not be downloaded.
    """
    path = resolve(model)
    if Path(path).exists() or not HUB_NAME.fullmatch(path):
        return path
    from lmdeploy.utils import get_model

    try:
        return get_model(path)
    except Exception as error:  # whatever the hub's client raises, the reason is in its text
        raise UnavailableError(
            f"there is no directory {path}, and the hub did not give a model of that name: {error}; "
            "give the path of a checkpoint"
        ) from error
