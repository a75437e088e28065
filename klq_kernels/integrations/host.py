"""What the drop-ins share: questions to an installed host, and replacements in it that can be undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, TracebackType
from typing import Any


class HostMismatch(RuntimeError):
    """The installed host lacks a name, or has a function with other parameters, that a drop-in was written for."""


class Host:
    """An installed package as a drop-in sees it: by its names and signatures, whatever its version says."""

    def __init__(self, package: str, written_for: str) -> None:
        self._package = package
        self._written_for = written_for

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``, or a HostMismatch."""
        if not hasattr(owner, name):
            raise self._mismatch(f"{_name(owner)} has no {name}")
        return getattr(owner, name)

    def require_parameters(self, function: Callable[..., Any], expected: tuple[str, ...]) -> None:
        """Raises a HostMismatch unless the parameters have these names, in this order."""
        found = tuple(inspect.signature(function).parameters)
        if found != expected:
            raise self._mismatch(f"{_name(function)} takes ({', '.join(found)}), not ({', '.join(expected)})")

    def require_use(self, function: Callable[..., Any], name: str) -> None:
        """Raises a HostMismatch unless the function, or one inside it, looks up the global ``name``."""
        if not any(name in code.co_names for code in _codes(function.__code__)):
            raise self._mismatch(f"{_name(function)} does not use {name}")

    def _mismatch(self, difference: str) -> HostMismatch:
        try:
            installed = version(self._package)
        except PackageNotFoundError:
            installed = "of unknown version"
        return HostMismatch(
            f"{self._package} {installed}: {difference}. The drop-in was written for {self._package} "
            f"{self._written_for}; install that, or run without the drop-in"
        )


class Patch:
    """Replaced attributes of a host. ``undo`` puts the originals back; so does leaving it as a context manager."""

    def __init__(self, replacements: list[tuple[Any, str, Any]]) -> None:
        """Each replacement is (owner, name, new value)."""
        self._originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
        for owner, name, new in replacements:
            setattr(owner, name, new)

    @property
    def active(self) -> bool:
        """Whether the replacements are in place through this object."""
        return bool(self._originals)

    def undo(self) -> None:
        """Puts the originals back. A second call changes nothing."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", None) or getattr(thing, "__name__", repr(thing)))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
