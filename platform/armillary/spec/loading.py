"""From a job file and command-line overrides to a checked, frozen job; and back to text.

Overrides are dotted (``objective.margin=0.4``). Overriding the name of an objective, backbone or view recipe drops the
options of the one it replaces: they belong to the thing named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from armillary.spec import document as yaml_document
from armillary.spec import environment
from armillary.spec.document import Document, KeyPath
from armillary.spec.errors import UserError, unknown_name
from armillary.spec.files import find
from armillary.spec.invalid import show
from armillary.spec.jobs import ChainJob, Job, Kinds, RegressionJob, StudyJob, SweepJob, TrainJob
from armillary.spec.overrides import apply_overrides, located, names_a_section, set_value, split_key, validate, value_at
from armillary.spec.section import Section, as_tree
from armillary.spec.spaces import check_space, read_space

__all__ = ["apply_overrides", "config_digest", "digest", "dump_job", "load_job", "located"]

COMMAND_LINE = "command line"
# Begins a value that stands for the run of an earlier step of a chain.
STEP = "step:"


def load_job(path: str | Path, overrides: Sequence[str] = (), *, kind: str | None = None) -> Job:
    """Reads a job, applies overrides and checks everything that can be checked without other layers.

    Args:
        path: a YAML file, or the name of one that ships with Armillary (``jobs/quickstart.yaml``, ``quickstart``).
        overrides: ``dotted.key=value``, the value in YAML; ``base.`` and ``jobs.0.job.`` reach into nested jobs.
        kind: refuse every other kind.

    Returns:
        The job, with the jobs and search spaces it names by path read in.

    Raises:
        UserError: the first mistake, with its place.
    """
    changes = [parse_override(text) for text in overrides]
    document = _assemble(find("jobs", path), changes, ())
    # Names first: they clear the options of what they replace, which later overrides then set.
    deep = [change for change in changes if not _is_reference(change[0])]
    for key, value in sorted(deep, key=lambda change: not names_a_section(change[0])):
        set_value(document, split_key(key), value, COMMAND_LINE)
    document.resolve_environment()
    if not isinstance(document.values, dict):
        raise UserError(
            f"found {show(document.values)}",
            where=document.place(()),
            allowed="a mapping, e.g. objective: {name: arcface}",
        )
    found = document.values.setdefault("kind", "train")
    if not isinstance(found, str) or found not in Kinds.MODELS:
        raise unknown_name("kind", found, list(Kinds.MODELS), where=document.place(("kind",)), key="kind")
    if kind is not None and found != kind:
        raise UserError(f"found {found!r}", where=document.place(("kind",)), key="kind", allowed=repr(kind))
    job = validate(Kinds.MODELS[found], document)
    _check_parts(job, document)
    return cast(Job, job)


def dump_job(job: Section) -> str:
    """The resolved job as YAML; what came from the environment stands as its ``${env:..}`` reference."""
    return yaml_document.dump(environment.references(as_tree(job)))


def digest(job: Section) -> str:
    """SHA-256 (hex) of the resolved job: equal exactly when every value is."""
    return _hash(as_tree(job, reveal=True))


def config_digest(job: TrainJob) -> str:
    """SHA-256 (hex) of what makes runs comparable: all but seed, fold, name, tracking and cluster."""
    tree = as_tree(job, reveal=True)
    for key in ("seed", "name", "tracking", "cluster"):
        del tree[key]
    del tree["data"]["fold"]
    return _hash(tree)


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(_canonical(tree), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Whole numbers lose their point: ``margin: 1`` and ``margin: 1.0`` are the same configuration."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_override(text: str) -> tuple[str, Any]:
    """A change as the command line takes it, ``key.subkey=value`` with a value in YAML, apart.

    Raises:
        UserError: it is not of that form.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"found {text!r}", where=COMMAND_LINE, allowed="key.subkey=value, e.g. objective.margin=0.4")
    if not value.strip():
        return key, None
    try:
        return key, yaml_document.parse(value, COMMAND_LINE).values
    except UserError as error:
        raise UserError(error.problem, where=COMMAND_LINE, key=key, allowed="a value in YAML") from None


def _is_reference(key: str) -> bool:
    """Keys that decide what is read and what is made of it, and so are overridden before the others."""
    return (
        key in ("kind", "base", "space") or key.startswith("set.") or (key.startswith("jobs.") and key.endswith(".job"))
    )


def _assemble(path: Path, changes: Sequence[tuple[str, Any]], chain: tuple[Path, ...], label: str = "") -> Document:
    """Reads a file and, in place of every path of a job or search space in it, what that path holds."""
    if path.resolve() in chain:
        names = " -> ".join(yaml_document.shown(item) for item in (*chain, path.resolve()))
        raise UserError(
            f"refers to itself: {names}", where=yaml_document.shown(path), allowed="the path of a train job"
        )
    document = yaml_document.read(path, label or None)
    for key, value in changes:
        if _is_reference(key):
            set_value(document, split_key(key), value, COMMAND_LINE)
    document.resolve_environment()
    if not isinstance(document.values, dict):
        return document
    for slot in _job_slots(document.values):
        _read_in(document, slot, path, (*chain, path.resolve()))
    if document.values.get("kind") == "sweep":
        _read_space(document, path)
    if document.values.get("kind") in ("sweep", "study", "chain"):
        _set_in_base(document)
    return document


def _job_slots(values: dict[str, Any]) -> list[KeyPath]:
    jobs = values.get("jobs")
    entries = jobs if values.get("kind") == "regression" and isinstance(jobs, list) else []
    slots: list[KeyPath] = [("jobs", i, "job") for i, entry in enumerate(entries) if isinstance(entry, dict)]
    return slots + ([("base",)] if values.get("kind") in ("sweep", "study", "chain") else [])


def _read_in(document: Document, slot: KeyPath, owner: Path, chain: tuple[Path, ...]) -> None:
    value = value_at(document.values, slot)
    place = document.place(slot)
    key = ".".join(map(str, slot))
    if isinstance(value, str):
        label = value.reference if isinstance(value, environment.FromEnvironment) else ""
        inner = _assemble(find("jobs", value, owner.parent, where=place, key=key), (), chain, label)
        document.set(slot, inner.values, place, inner)
        value = inner.values
    if isinstance(value, dict) and value.get("kind", "train") != "train":
        raise UserError(
            f"found a job of kind {value['kind']!r}",
            where=document.place((*slot, "kind")),
            key=key,
            allowed="a train job",
        )


def _read_space(document: Document, owner: Path) -> None:
    value = document.values.get("space")
    if isinstance(value, str):
        space = read_space(value, owner.parent, where=document.place(("space",)))
        document.set(("space",), space.values, document.place(("space",)), space)


def _set_in_base(document: Document) -> None:
    """Applies the ``set`` of a sweep or study to its base, so that what runs is what the resolved job shows."""
    changes = document.values.get("set")
    if not isinstance(changes, dict) or not isinstance(document.values.get("base"), dict):
        return
    del document.values["set"]
    for key, value in sorted(changes.items(), key=lambda change: not names_a_section(change[0])):
        set_value(document, ("base", *split_key(key)), value, document.place(("set", key)))


def _check_parts(job: Section, document: Document) -> None:
    """What spans several keys: ranges, the overrides inside studies and regressions, and names that refer to rows."""
    if isinstance(job, SweepJob):
        check_space(cast(dict[str, Any], job.space), document.place, ("space",))
    elif isinstance(job, StudyJob):
        names = [variant.name for variant in job.variants]
        for index, variant in enumerate(job.variants):
            if variant.name in names[:index]:
                raise UserError(
                    f"a second variant is named {variant.name!r}",
                    where=document.place(("variants", index, "name")),
                    key=f"variants.{index}.name",
                    allowed="each name once",
                )
            _check_set(job.base, variant.set, document, ("variants", index, "set"))
        for index, name in enumerate(job.compare or ()):
            if name not in names:
                path: KeyPath = ("compare", index)
                raise unknown_name("variant", name, names, where=document.place(path), key=f"compare.{index}")
    elif isinstance(job, ChainJob):
        _check_steps(job, document)
    elif isinstance(job, RegressionJob):
        for index, entry in enumerate(job.jobs):
            _check_set(entry.job, entry.set, document, ("jobs", index, "set"))


def _check_steps(job: ChainJob, document: Document) -> None:
    names: list[str] = []
    for index, step in enumerate(job.steps):
        if step.name in names:
            path: KeyPath = ("steps", index, "name")
            raise UserError(
                f"a second step is named {step.name!r}", where=document.place(path), allowed="each name once"
            )
        for key, value in step.set.items():
            if isinstance(value, str) and value.startswith(STEP) and value.removeprefix(STEP) not in names:
                where = document.place(("steps", index, "set", key))
                raise unknown_name("earlier step", value.removeprefix(STEP), names, where=where, key=key)
        _check_set(job.base, step.set, document, ("steps", index, "set"))
        names.append(step.name)


def _check_set(job: TrainJob, changes: Mapping[str, Any], document: Document, path: KeyPath) -> None:
    for key in changes:
        # One at a time, so that the message names the line; names first, as they are applied.
        named = {name: value for name, value in changes.items() if names_a_section(name)}
        apply_overrides(job, named | {key: changes[key]}, where=document.place((*path, key)))
