"""Things by name: scorers and levels. A file in the right folder that registers a class is found by itself."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any, ClassVar, Generic, Protocol, TypeVar


class Named(Protocol):
    """What can be registered: classes with a `name`."""

    name: ClassVar[str]


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Classes by their `name`; frozen dataclasses, whose fields are what a user may set.

    Attributes:
        what: what is registered, for messages.
    """

    def __init__(self, what: str, package: str) -> None:
        """Keep what the modules of `package` register; they are imported on first use."""
        self.what, self._package = what, package
        self._classes: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: make `cls` available under its `name`.

        Raises:
            ValueError: the name is taken by another class.
        """
        if not cls.__module__.startswith(self._package):
            self._discover()
        name = cls.name
        taken = self._classes.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{self.what} name {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        self._classes[name] = cls
        return cls

    def __getitem__(self, name: str) -> type[T]:
        """Return a class; "-" and "_" are the same in a name.

        Raises:
            ValueError: unknown name; the message has the nearest ones.
        """
        self._discover()
        if isinstance(name, str) and name not in self._classes:
            alike = [one for one in self._classes if one.replace("-", "_") == name.replace("-", "_")]
            name = alike[0] if alike else name
        if not isinstance(name, str) or name not in self._classes:
            near = difflib.get_close_matches(str(name), self._classes, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"unknown {self.what} {name!r}; expected one of {self.names()}{hint}")
        return self._classes[name]

    def make(self, text: str) -> T:
        """Return an object by name, "snapkv", or by name and settings, "snapkv(window_size=32, kernel_size=7)".

        Raises:
            ValueError: unknown name or setting, or a value that is not a Python literal or of the wrong kind.
        """
        name, bracket, _ = text.partition("(") if isinstance(text, str) else (text, "", "")
        cls = self[name.strip() if isinstance(name, str) else name]
        settings = self._settings(text) if bracket else {}
        fields = tuple(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]
        for key in settings:
            if key not in fields:
                raise ValueError(f"{self.what} {name!r} has no setting {key!r}; it has {fields}")
        try:
            return cls(**settings)
        except TypeError as error:  # a value of another kind than the setting's
            raise ValueError(f"{self.what} {text!r}: {error}") from None

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        self._discover()
        return tuple(sorted(self._classes))

    def classes(self) -> list[type[T]]:
        """All classes, by name."""
        return [self[name] for name in self.names()]

    def _settings(self, text: str) -> dict[str, Any]:
        try:
            call = ast.parse(f"settings({text.partition('(')[2].strip()}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or any(one.arg is None for one in call.keywords):
                raise ValueError("settings are written name=value")
            return {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"{self.what} {text!r} cannot be read: {str(error) or type(error).__name__}") from None

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
            importlib.import_module(module.name)


def split_list(text: str) -> list[str]:
    """Split "snapkv(window_size=8, kernel_size=3),knorm" at the commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
