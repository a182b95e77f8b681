"""Changing jobs by dotted key: what the command line, sweeps, studies and regressions share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from armillary.spec.document import Document, KeyPath
from armillary.spec.errors import UserError
from armillary.spec.invalid import explain
from armillary.spec.jobs import TrainJob
from armillary.spec.section import OpenSection, Section, as_tree

JobType = TypeVar("JobType", bound=Section)

_OPEN = {
    name: field.annotation
    for name, field in TrainJob.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, OpenSection)
}


def apply_overrides(job: JobType, overrides: Mapping[str, Any], *, where: str | None = None) -> JobType:
    """The same job with some dotted keys changed, checked again.

    Args:
        job: any job.
        overrides: values by dotted key, as a study's ``set`` or a trial's parameters.
        where: names the origin of the overrides in errors.

    Raises:
        UserError: an unknown key, or a value that is not allowed.
    """
    document = Document(as_tree(job), dict(job._places), where or "overrides")
    for key, value in sorted(overrides.items(), key=lambda change: not names_a_section(change[0])):
        set_value(document, split_key(key), value, document.source)
    return validate(type(job), document)


def split_key(key: str) -> KeyPath:
    """A dotted key as a path; the keys inside ``set`` and ``space`` are dotted themselves and stay whole."""
    parts = key.split(".")
    path: list[str | int] = []
    for index, part in enumerate(parts):
        path.append(int(part) if part.isdecimal() else part)
        rest = parts[index + 1 :]
        if rest and part == "set":
            return (*path, ".".join(rest))
        if rest and part == "space" and index == 0:
            bound = rest[-1] in ("low", "high", "log", "int", "choices")
            return (*path, ".".join(rest[:-1]), rest[-1]) if bound else (*path, ".".join(rest))
    return tuple(path)


def names_a_section(key: str) -> bool:
    """Whether a dotted key is the name of an objective, backbone or view recipe; those are set before other keys."""
    parts = key.split(".")
    return len(parts) > 1 and parts[-1] == "name" and parts[-2] in _OPEN


def value_at(values: Any, path: KeyPath) -> Any:
    """What a path of keys leads to, ``None`` where it leads nowhere."""
    for part in path:
        if isinstance(values, dict):
            values = values.get(str(part))
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            return None
    return values


def set_value(document: Document, path: KeyPath, value: Any, place: str) -> None:
    """Changes one key; a new name of an objective, backbone or view recipe drops the options of the old one.

    Raises:
        UserError: the path leads through a plain value or past the end of a list.
    """
    if not isinstance(document.values, dict):
        return
    if len(path) > 1 and path[-1] == "name" and path[-2] in _OPEN:
        section = value_at(document.values, path[:-1])
        if isinstance(section, dict) and section.get("name") != value:
            declared = _OPEN[str(path[-2])].model_fields
            for option in [key for key in section if key not in declared]:
                del section[option]
    document.set(path, value, place)


def validate(model: type[JobType], document: Document) -> JobType:
    """Checks a document as a job.

    Raises:
        UserError: the first mistake, with its place.
    """
    try:
        job = model.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, model, document.place) from None
    _remember_places(job, document.places)
    return job


def _remember_places(job: Section, places: dict[KeyPath, str]) -> None:
    job._places = dict(places)
    nested: dict[KeyPath, Any] = {("base",): getattr(job, "base", None)}
    nested |= {("jobs", index, "job"): entry.job for index, entry in enumerate(getattr(job, "jobs", ()))}
    for slot, inner in nested.items():
        if isinstance(inner, Section):
            inner._places = {path[len(slot) :]: place for path, place in places.items() if path[: len(slot)] == slot}


@contextmanager
def located(job: Section) -> Iterator[None]:
    """Adds file and line to every :class:`UserError` of the block that names a key of ``job`` but no place.

    Other layers check what they own (hyperparameters, protocols, batch sizes) with the job alone; this is how their
    messages point into the user's file.
    """
    try:
        yield
    except UserError as error:
        if error.where is not None or error.key is None:
            raise
        where = Document(None, job._places, "").place(split_key(error.key)) or None
        raise UserError(
            error.problem, where=where, key=error.key, allowed=error.allowed, hint=error.hint
        ) from error.__cause__
