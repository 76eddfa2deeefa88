"""How LMDeploy is changed while the plug is enabled, and put back exactly afterwards.

A `Patch` names one attribute of LMDeploy (or of torch), says why it must change and when, and builds the replacement
from the original. Each is checked against the LMDeploy release this package was written for, by the fingerprint of the
source it replaces; where one does not match, all that was changed is put back.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import Any, Literal

from epbackend.errors import EPError, UnavailableError

LMDEPLOY_VERSION = "0.18.0"

When = Literal["always", "cpu", "cuda", "ascend", "ep", "mp", "ray", "run", "server"]
"""What makes a patch needed: the device, several expert ranks, the executor of the ranks, `epbackend run`, whose hooks
come before the plug, or the API server."""

Build = Callable[[Any], Any]


@dataclass(frozen=True)
class Patch:
    """One attribute to replace."""

    name: str
    target: str
    """`module:attribute` or `module:Class.attribute`."""
    why: str
    when: When
    build: Build = field(repr=False)
    """Makes the replacement from the original."""
    fingerprint: str | None = None
    """Of the original's source in LMDeploy 0.18.0; None for what is not LMDeploy's own and only has to exist."""
    only_if: Callable[[], bool] = field(default=lambda: True, repr=False)
    """Asked where the patch would be applied: whether what is installed beside LMDeploy needs it."""

    def find(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name.

        Raises:
            UnavailableError: there is no such attribute.
        """
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            inspect.getattr_static(owner, name)
        except (ImportError, AttributeError) as error:
            raise UnavailableError(f"{_moved(self)}: {error}") from error
        return owner, name

    def check(self) -> None:
        """Raises UnavailableError, naming this patch, where the attribute is not the one it was written for."""
        owner, name = self.find()
        if self.fingerprint is not None and fingerprint(getattr(owner, name)) != self.fingerprint:
            raise UnavailableError(f"{_moved(self)}: its source is another one")


def patch(
    target: str,
    *,
    why: str,
    when: When,
    fingerprint: str | None = None,
    only_if: Callable[[], bool] = lambda: True,
) -> Callable[[Build], Patch]:
    """Decorator: the function below, which makes a replacement from the original, becomes the Patch of its name."""

    def make(build: Build) -> Patch:
        return Patch(build.__name__.replace("_", "-"), target, why, when, build, fingerprint, only_if)

    return make


def replaced_by(name: str) -> Build:
    """A build that answers with the object at `module:attribute`, which is imported when the patch is applied.

    So a patch can use modules that enable the plug themselves, and that its own module therefore cannot import.
    """
    return lambda original: resolve_name(name)


def built_by(name: str) -> Build:
    """The build function at `module:function`, likewise."""
    return lambda original: resolve_name(name)(original)


def fingerprint(function_or_class: Any) -> str:
    """Twelve hex digits of the SHA-256 of the source."""
    return hashlib.sha256(inspect.getsource(function_or_class).encode()).hexdigest()[:12]


def check_version() -> None:
    """Raises UnavailableError unless the LMDeploy installed is the release whose hooks are known."""
    remedy = f"pip install --no-deps lmdeploy=={LMDEPLOY_VERSION}"
    try:
        installed = version("lmdeploy")
    except PackageNotFoundError:
        raise UnavailableError(f"LMDeploy is not installed; install it: {remedy}") from None
    if installed != LMDEPLOY_VERSION:
        raise UnavailableError(
            f"LMDeploy {installed} is installed, but this plug knows the hooks of {LMDEPLOY_VERSION} only; "
            f"install that one: {remedy}"
        )


class Patches:
    """Patches as they stand: what was replaced, and by which patch."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Patch, Any, str, Any]] = []

    @property
    def applied(self) -> bool:
        """Whether any patch stands."""
        return bool(self._replaced)

    def apply(self, patches: Iterable[Patch], *, check: bool = True) -> None:
        """Replaces every target in order, or none of them where a check or a replacement fails."""
        try:
            for each in patches:
                if not each.only_if():
                    continue
                if check:
                    each.check()
                self._replace(each)
        except BaseException:
            self.restore()
            raise

    def apply_once(self, patches: Iterable[Patch]) -> None:
        """As `apply`, for those that are not applied yet."""
        applied = [each for each, *_ in self._replaced]
        self.apply([each for each in patches if each not in applied])

    def restore(self) -> None:
        """Puts back every original, the very object, last replaced first."""
        while self._replaced:
            _, owner, name, original = self._replaced.pop()
            setattr(owner, name, original)

    def original(self, name: str) -> Any:
        """What the patch of that name replaced."""
        for each, _, _, original in self._replaced:
            if each.name == name:
                return original.__func__ if isinstance(original, staticmethod) else original
        raise EPError(f"patch {name!r} is not applied: call epbackend.enable(config) first")

    def _replace(self, each: Patch) -> None:
        owner, name = each.find()
        original = inspect.getattr_static(owner, name)
        if isinstance(original, staticmethod):
            replacement: Any = staticmethod(each.build(original.__func__))
        else:
            replacement = each.build(original)
        setattr(owner, name, replacement)
        self._replaced.append((each, owner, name, original))


def _moved(each: Patch) -> str:
    return (
        f"LMDeploy's hook {each.target!r} (patch {each.name!r}: {each.why}) is not the one of {LMDEPLOY_VERSION}; "
        f"reinstall it: pip install --no-deps --force-reinstall lmdeploy=={LMDEPLOY_VERSION}"
    )
