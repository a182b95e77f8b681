"""From pydantic's findings to the one message a user reads: where, which key, what was found, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from armillary.spec.environment import Path
from armillary.spec.errors import UserError, nearest

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "object": "a mapping",
    "null": "null",
    "array": "a list",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def explain(
    error: ValidationError, model: type[BaseModel], place: Callable[[Path], str | None], prefix: Path = ()
) -> UserError:
    """The first mistake of a failed validation, as a message.

    Args:
        error: what validating ``model`` raised.
        model: the model that was validated.
        place: where the key with a given path stands.
        prefix: the keys that lead to what was validated.
    """
    findings = error.errors(include_url=False)
    # A misspelt required key is both unknown and missing; the unknown one knows the nearest valid name.
    first = min(findings, key=lambda finding: finding["type"] != "extra_forbidden")
    path, schema = _locate(first["loc"], model)
    key = ".".join(map(str, (*prefix, *path))) or None
    if first["type"] == "extra_forbidden":
        return _unknown_key(str(first["loc"][-1]), (*prefix, *path), model, schema, place)
    where = place((*prefix, *path))
    allowed = describe(schema, model)
    if first["type"] == "missing":
        return UserError("this key is required", where=where, key=key, allowed=allowed)
    if first["type"] == "value_error":
        return UserError(first["msg"].removeprefix("Value error, "), where=where, key=key)
    hint = None
    if first["type"] in ("model_type", "dict_type") and "name" in _properties(schema, model):
        hint = f"write {key}: {{name: ...}}"
    elif first["type"] == "literal_error" and isinstance(first["input"], str):
        close = nearest(first["input"], [str(value) for value in schema.get("enum", ())], count=1)
        hint = f"did you mean {close[0]!r}?" if close else None
    return UserError(f"found {show(first['input'])}", where=where, key=key, allowed=allowed, hint=hint)


def _unknown_key(
    name: str, section: Path, model: type[BaseModel], schema: dict[str, Any], place: Callable[[Path], str | None]
) -> UserError:
    siblings = list(_properties(schema, model))
    elsewhere = [key for key in dotted_keys(model) if key.rsplit(".", 1)[-1] == name]
    close = nearest(name, siblings) or elsewhere
    return UserError(
        f"unknown key {name!r}",
        where=place((*section, name)),
        key=".".join(map(str, (*section, name))),
        allowed=", ".join(siblings),
        hint=f"did you mean {' or '.join(repr(item) for item in close[:3])}?" if close else None,
    )


def show(value: object) -> str:
    """A value as messages quote it: its YAML-like text, cut to one short line; secrets stay references."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _deref(schema: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    target: dict[str, Any] = _schema(model)["$defs"][reference.rsplit("/", 1)[-1]]
    return target


def _properties(schema: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = _deref(schema, model).get("properties", {})
    return properties


def _step(schema: dict[str, Any], part: str | int, model: type[BaseModel]) -> dict[str, Any] | None:
    schema = _deref(schema, model)
    for option in schema.get("anyOf", ()):
        found = _step(option, part, model)
        if found is not None:
            return found
    if isinstance(part, int):
        places = schema.get("prefixItems")
        if places is not None:
            return places[part] if part < len(places) else None
        item: dict[str, Any] | None = schema.get("items")
        return item
    step: dict[str, Any] | None = schema.get("properties", {}).get(part)
    return step


def _locate(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[Path, dict[str, Any]]:
    """The part of a location that are real keys, and the schema there; pydantic adds names of union branches."""
    path: Path = ()
    schema: dict[str, Any] = _schema(model)
    for part in location:
        step = _step(schema, part, model)
        if step is None:
            break
        path, schema = (*path, part), step
    return path, schema


def dotted_keys(model: type[BaseModel]) -> Iterator[str]:
    """Every dotted key of a model, sections left out."""

    def walk(schema: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, item in _properties(schema, model).items():
            inner = _properties(item, model)
            if inner:
                yield from walk(item, f"{prefix}{name}.")
            else:
                yield prefix + name

    return walk(_schema(model), "")


def describe(schema: dict[str, Any], model: type[BaseModel]) -> str:
    """A JSON Schema in words, e.g. ``a number, > 0 and <= 100 (peak learning rate)``."""
    words = _words(_deref(schema, model) | {key: item for key, item in schema.items() if key != "$ref"}, model)
    description = schema.get("description")
    return f"{words} ({description})" if description else words


def _words(schema: dict[str, Any], model: type[BaseModel]) -> str:
    schema = _deref(schema, model)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_words(option, model) for option in schema["anyOf"]))
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return ", ".join(repr(value) for value in schema["enum"])
    kind = schema.get("type", "")
    parts = [_TYPES.get(kind, "anything")]
    if "properties" in schema:
        parts[0] = f"a mapping with {', '.join(schema['properties'])}"
    elif "prefixItems" in schema:
        parts[0] = f"a list of {len(schema['prefixItems'])}: " + ", ".join(
            _words(item, model) for item in schema["prefixItems"]
        )
    elif kind == "array" and schema.get("items"):
        inner = _deref(schema["items"], model)
        parts[0] = "a list of mappings" if "properties" in inner else f"a list, each {_words(inner, model)}"
    bounds = [f"{sign} {_number(schema[word])}" for word, sign in _BOUNDS.items() if word in schema]
    if bounds:
        parts.append(" and ".join(bounds))
    if "pattern" in schema:
        parts.append(f"matching {schema['pattern']}")
    if "maxLength" in schema:
        parts.append(f"at most {schema['maxLength']} characters")
    if schema.get("minLength") or (schema.get("minItems") and "prefixItems" not in schema):
        parts.append("not empty")
    return ", ".join(parts)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"
