"""The base of every part of a job: frozen, strict about keys, and discreet about the environment.

A value that came from ``${env:..}`` is usable as an attribute, and appears as the reference in ``repr``,
``model_dump`` and ``model_dump_json``, so that no log, tracker or resolved file ever holds a secret. To send a job to
another process, send the object (pickle keeps the values), not its dump.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from armillary.spec import environment
from armillary.spec.environment import FromEnvironment


class _Discreet(BaseModel):
    # Field name -> the value as given, with FromEnvironment leaves; only fields that hold such a leaf are listed, and
    # never those that are sections themselves, which keep their own list.
    _from_environment: dict[str, Any] = PrivateAttr(default_factory=dict)
    # Where each path of keys stands in the user's files; only a whole job has any.
    _places: dict[environment.Path, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_references(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        given = environment.resolve(data)
        section = handler(given)
        for key, value in given.items():
            checked = getattr(section, key, None)
            if not environment.involved(value) or _holds_sections(checked):
                continue
            section._from_environment[key] = value
            if isinstance(value, FromEnvironment) and isinstance(checked, str) and key in section.__dict__:
                # Validation makes a plain text of it; this one shows its reference in other layers' messages too.
                section.__dict__[key] = value
        return section

    @model_serializer(mode="wrap")
    def _write_references(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        for key, value in self._from_environment.items():
            if key in written:
                written[key] = environment.references(value)
        return written

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for key, value in super().__repr_args__():
            given = self._from_environment.get(key or "")
            yield key, value if given is None else environment.references(given)

    def __eq__(self, other: object) -> bool:
        # What a job says makes it equal, not the file it came from.
        return (
            isinstance(other, _Discreet)
            and type(self) is type(other)
            and self.__dict__ == other.__dict__
            and self.__pydantic_extra__ == other.__pydantic_extra__
            and self._from_environment == other._from_environment
        )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As in pydantic; a field that is replaced no longer refers to the environment."""
        copy = super().model_copy(update=update, deep=deep)
        copy._from_environment = {
            key: value for key, value in self._from_environment.items() if key not in (update or {})
        }
        return copy


class Section(_Discreet):
    """A part of a job: immutable, and every key must exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenSection(_Discreet):
    """A part named by ``name`` whose other keys belong to the thing named, which validates them itself."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside ``name``."""
        return dict(self.__pydantic_extra__ or {})


def _holds_sections(value: Any) -> bool:
    items = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, BaseModel) for item in items)


def as_tree(value: Any, *, reveal: bool = False) -> Any:
    """A section as nested dicts and lists, to be changed and validated again.

    Args:
        value: a section, or anything inside one.
        reveal: give values from the environment as validated, for digests; otherwise as :class:`FromEnvironment`.
    """
    if isinstance(value, _Discreet):
        fields = {name: getattr(value, name) for name in type(value).model_fields} | (value.__pydantic_extra__ or {})
        given = {} if reveal else value._from_environment
        return {key: given[key] if key in given else as_tree(item, reveal=reveal) for key, item in fields.items()}
    if isinstance(value, dict):
        return {key: as_tree(item, reveal=reveal) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_tree(item, reveal=reveal) for item in value]
    return value
