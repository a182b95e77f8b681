"""Names to objectives: every family module of this package is found by itself, outside ones through entry points."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from armillary.objectives.base import Objective
from armillary.spec.errors import UserError, nearest, unknown_name

_REGISTERED: dict[str, type[Objective]] = {}
_NOT_FAMILIES = {"base", "bases", "card", "registry", "regularizers", "terms"}
ENTRY_POINT_GROUP = "armillary.objectives"


def register(cls: type[Objective]) -> type[Objective]:
    """Class decorator: makes an objective known under its ``name``."""
    other = _REGISTERED.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"objective {cls.name!r} is registered twice: {other.__module__} and {cls.__module__}")
    _REGISTERED[cls.name] = cls
    return cls


@cache
def _discover() -> None:
    package = importlib.import_module("armillary.objectives")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        if module.name not in _NOT_FAMILIES:
            importlib.import_module(f"armillary.objectives.{module.name}")
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda item: item.name):
        point.load()


def names() -> list[str]:
    """All registered names, sorted."""
    _discover()
    return sorted(_REGISTERED)


def get(name: str, **context: str | None) -> type[Objective]:
    """The objective class of that name.

    Raises:
        UserError: no such objective; shows the nearest names. ``context`` (``where``, ``key``) goes into the message.
    """
    _discover()
    if name not in _REGISTERED:
        raise unknown_name("objective", name, names(), **context)
    return _REGISTERED[name]


def hyperparameters(name: str, options: dict[str, Any], *, where: str | None = None) -> Any:
    """Validated hyperparameters of the named objective.

    Raises:
        UserError: an unknown key, a wrong type or a value out of range, with what is allowed.
    """
    cls = get(name, where=where, key="objective.name")
    try:
        return cls.Hyperparameters(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        fields = cls.Hyperparameters.model_fields
        if first["type"] == "extra_forbidden":
            close = nearest(key, fields)
            raise UserError(
                f"{name} has no hyperparameter {key!r}",
                where=where,
                key=f"objective.{key}",
                allowed=", ".join(fields) or "none",
                hint=f"did you mean {close[0]!r}?" if close else None,
            ) from None
        raise UserError(
            f"{first['msg']}, found {first['input']!r}",
            where=where,
            key=f"objective.{key}",
            allowed=legal_range(cls, key.split(".")[0]),
        ) from None


def legal_range(cls: type[Objective], key: str) -> str | None:
    """The type and bounds of a hyperparameter in words, e.g. ``number, >= 0 and <= 1.57``."""
    schema = cls.Hyperparameters.model_json_schema()["properties"].get(key)
    if schema is None:
        return None
    if "enum" in schema:
        return ", ".join(repr(value) for value in schema["enum"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[word]:g}" for word, sign in signs.items() if word in schema)
    return ", ".join(part for part in (str(schema.get("type", "")), bounds) if part) or None
