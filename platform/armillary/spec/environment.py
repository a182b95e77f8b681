"""``${env:NAME}`` in a job: the value is used, and only the reference is ever shown."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from armillary.spec.errors import UserError, nearest

Path = tuple[str | int, ...]

_REFERENCE = re.compile(r"\$\{env:([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class FromEnvironment(str):
    """A text that came, wholly or in part, from environment variables; its ``repr`` is what the user wrote.

    Args:
        value: the text with the variables filled in.
        reference: the text as written, e.g. ``s3://${env:BUCKET}/faces``.
    """

    __slots__ = ("reference",)
    reference: str

    def __new__(cls, value: str, reference: str) -> FromEnvironment:  # noqa: D102
        self = super().__new__(cls, value)
        self.reference = reference
        return self

    def __repr__(self) -> str:
        return repr(self.reference)

    def __reduce__(self) -> tuple[object, ...]:
        return FromEnvironment, (str(self), self.reference)


def resolve(value: Any, place: Callable[[Path], str | None] = lambda _: None, path: Path = ()) -> Any:
    """The same lists and mappings with every ``${env:..}`` filled in; what is filled in already stays as it is.

    Args:
        value: plain values as read from YAML.
        place: where a key stands, for the error.
        path: the keys that lead to ``value``.

    Raises:
        UserError: a variable is not set and has no default, or a reference is malformed.
    """
    if isinstance(value, dict):
        return {key: resolve(item, place, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(item, place, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, str) and not isinstance(value, FromEnvironment) and "${env:" in value:
        return _fill_in(value, place(path), ".".join(map(str, path)) or None)
    return value


def _fill_in(text: str, where: str | None, key: str | None) -> FromEnvironment:
    def look_up(match: re.Match[str]) -> str:
        name, separator, default = match.group(1).partition(":-")
        if not _NAME.fullmatch(name):
            raise malformed
        if name in os.environ:
            return os.environ[name]
        if separator:
            return default
        close = nearest(name, os.environ, count=1)
        raise UserError(
            f"the environment variable {name} is not set",
            where=where,
            key=key,
            allowed=f"set {name}, or write a default: ${{env:{name}:-value}}",
            hint=f"{close[0]} is set" if close else None,
        )

    malformed = UserError(
        f"found {text!r}, which is no reference to an environment variable",
        where=where,
        key=key,
        allowed="${env:NAME} or ${env:NAME:-default}; a name is letters, digits and _",
    )
    if _REFERENCE.sub("", text).count("${env:"):
        raise malformed
    return FromEnvironment(_REFERENCE.sub(look_up, text), text)


def involved(value: Any) -> bool:
    """Whether any part of a value came from the environment."""
    if isinstance(value, dict):
        return any(involved(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(involved(item) for item in value)
    return isinstance(value, FromEnvironment)


def references(value: Any) -> Any:
    """The same value with everything from the environment replaced by the reference to it."""
    if isinstance(value, dict):
        return {key: references(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [references(item) for item in value]
    return value.reference if isinstance(value, FromEnvironment) else value
