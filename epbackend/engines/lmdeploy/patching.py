"""How LMDeploy is changed while the plug is enabled, and put back exactly afterwards.

A `Patch` names one attribute of LMDeploy (or of torch), says why it must change and when, and builds the replacement
from the original. Each is checked against the LMDeploy release this package was written for, by the fingerprint of the
source it replaces; where one does not match, all that was changed is put back.

What costs seconds to import and is seldom needed, a model's module, is checked in its file and patched when LMDeploy
imports it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from importlib.util import resolve_name as absolute_name
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal

from epbackend.errors import EPError, UnavailableError

LMDEPLOY_VERSION = "0.18.0"

MODELS = "lmdeploy.pytorch.models."

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

    @property
    def module(self) -> str:
        """The name of the target's module."""
        return self.target.partition(":")[0]

    @property
    def waits(self) -> bool:
        """Whether it is applied when its module is imported: a model's, which only who serves that model imports."""
        return self.module.startswith(MODELS) and self.module not in sys.modules

    def find(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name.

        Raises:
            UnavailableError: there is no such attribute, or a package is missing that LMDeploy imports there.
        """
        *parents, name = self.target.partition(":")[2].split(".")
        try:
            owner: Any = import_module(self.module)
            for parent in parents:
                owner = getattr(owner, parent)
            inspect.getattr_static(owner, name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in ("", "lmdeploy"):
                raise UnavailableError(f"{_moved(self)}: {error}") from error
            raise UnavailableError(
                f"{missing} is not installed, which {self.module} imports (patch {self.name!r}: {self.why}): "
                f"pip install {missing}"
            ) from error
        except (ImportError, AttributeError) as error:
            raise UnavailableError(f"{_moved(self)}: {error}") from error
        return owner, name

    def check(self) -> None:
        """Raises UnavailableError, naming this patch, where the attribute is not the one it was written for."""
        if self.waits:
            source = source_in_file(self.target)
            if source is None:
                raise UnavailableError(f"{_moved(self)}: there is no such source")
        else:
            owner, name = self.find()
            if self.fingerprint is None:
                return
            source = inspect.getsource(getattr(owner, name))
        if fingerprint(source) != self.fingerprint:
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
        return Patch(build.__name__.replace("_", "-"), target, why, when, build, fingerprint, only_if=only_if)

    return make


def replaced_by(name: str) -> Build:
    """A build that answers with the object at `module:attribute`, which is imported when the patch is applied.

    So a patch can use modules that enable the plug themselves, and that its own module therefore cannot import.
    """
    return lambda original: resolve_name(name)


def built_by(name: str) -> Build:
    """The build function at `module:function`, likewise."""
    return lambda original: resolve_name(name)(original)


def fingerprint(source: str) -> str:
    """Twelve hex digits of the SHA-256 of a function's or class's source."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def source_in_file(target: str) -> str | None:
    """The lines of the class or function at `module:path`, whose module is not imported; None where it has none."""
    module, _, path = target.partition(":")
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for name in path.split("."):
        named = [each for each in node.body if getattr(each, "name", None) == name]
        if not named:
            origin = _imported_from(node, name, spec.parent)
            return source_in_file(f"{origin}:{path}") if origin else None
        node = named[-1]
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])


def _imported_from(module: ast.AST, name: str, package: str | None) -> str | None:
    """The module from which another one, of that package, takes a name; None where it does not."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and any(
            (each.asname or each.name) == name for each in node.names
        ):
            return absolute_name("." * node.level + (node.module or ""), package)
    return None


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
        self._hook = _ImportHook(self._replace)

    @property
    def applied(self) -> bool:
        """Whether any patch stands."""
        return bool(self._replaced)

    def apply(self, patches: Iterable[Patch], *, check: bool = True) -> None:
        """Replaces every target in order, or none of them where a check or a replacement fails."""
        if self._hook not in sys.meta_path:
            sys.meta_path.insert(0, self._hook)
        try:
            for each in patches:
                if not each.only_if():
                    continue
                if check:
                    each.check()
                if each.waits:
                    self._hook.waiting.append(each)
                else:
                    self._replace(each)
        except BaseException:
            self.restore()
            raise

    def apply_once(self, patches: Iterable[Patch]) -> None:
        """As `apply`, for those that are not applied yet."""
        applied = [*(each for each, *_ in self._replaced), *self._hook.waiting]
        self.apply([each for each in patches if each not in applied])

    def restore(self) -> None:
        """Puts back every original, the very object, last replaced first."""
        self._hook.waiting.clear()
        if self._hook in sys.meta_path:
            sys.meta_path.remove(self._hook)
        while self._replaced:
            _, owner, name, original = self._replaced.pop()
            setattr(owner, name, original)

    def original(self, name: str) -> Any:
        """What the patch of that name replaced."""
        for each, _, _, original in self._replaced:
            if each.name == name:
                return original.__func__ if isinstance(original, staticmethod | classmethod) else original
        raise EPError(f"patch {name!r} is not applied: call epbackend.enable(config) first")

    def _replace(self, each: Patch) -> None:
        owner, name = each.find()
        original = inspect.getattr_static(owner, name)
        if isinstance(original, staticmethod | classmethod):  # the build sees the function
            replacement: Any = type(original)(each.build(original.__func__))
        else:
            replacement = each.build(original)
        setattr(owner, name, replacement)
        self._replaced.append((each, owner, name, original))


class _ImportHook(MetaPathFinder):
    """Hands each of its patches to `apply` when the patch's module has been imported."""

    def __init__(self, apply: Callable[[Patch], None]) -> None:
        self.waiting: list[Patch] = []
        self._apply = apply

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if all(each.module != name for each in self.waiting):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((each for each in specs if each is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for each in [each for each in self.waiting if each.module == name]:
                    self.waiting.remove(each)
                    self._apply(each)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _moved(each: Patch) -> str:
    return (
        f"LMDeploy's hook {each.target!r} (patch {each.name!r}: {each.why}) is not the one of {LMDEPLOY_VERSION}; "
        f"reinstall it: pip install --no-deps --force-reinstall lmdeploy=={LMDEPLOY_VERSION}"
    )
