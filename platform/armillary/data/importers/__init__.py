"""Where datasets come from: those that ship in packages, and the archives and folders that users bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from armillary.data.images import read_image
from armillary.data.importers.contents import Progress, store
from armillary.data.importers.options import Options
from armillary.data.importers.source import Source
from armillary.data.importers.table import IMPORTERS, Importer
from armillary.data.store import Dataset, dataset_exists, open_dataset
from armillary.spec.errors import UserError, unknown_name

__all__ = ["IMPORTERS", "Importer", "Progress", "ensure_dataset", "import_dataset", "read_image"]


def import_dataset(
    kind: str,
    name: str | None = None,
    source: str | Path | None = None,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Imports a dataset into the store. A killed import of the same source goes on when it is repeated.

    Args:
        kind: a key of :data:`IMPORTERS`.
        name: its name in the store, a path or an ``s3://`` URL; default: the kind, or the source's name.
        source: what to import, a path or an ``s3://`` URL, for kinds that are not embedded.
        progress: called after every image with how many are done and how many there are.
        options: what the kind can be told, see its ``options``.

    Raises:
        UserError: an unknown kind or option, no such source, one that is damaged or hostile, an existing dataset of
            that name, a missing package.
    """
    if kind not in IMPORTERS:
        raise unknown_name("importer", kind, list(IMPORTERS))
    importer, report = IMPORTERS[kind], progress or (lambda *_: None)
    told = _options(kind, importer.options, options or {})
    if importer.make is not None:
        if source is not None:
            raise UserError(f"{kind} is embedded and takes no source, found {str(source)!r}")
        return importer.make(name or kind, None, report)
    assert importer.read is not None, "a kind is embedded or read"
    if not source:
        raise UserError(f"{kind} needs a source", hint=f"armillary data import {kind} SOURCE")
    origin = Source(source, kind)
    target = name or _name(origin)
    if dataset_exists(target):
        # Before the source is looked through, which can take long.
        raise UserError(f"dataset {target!r} exists already", hint="delete it or use another name: --name NAME")
    return store(target, importer.read(origin, told), origin, told, report)


def ensure_dataset(name_or_path: str) -> Dataset:
    """Opens a dataset; an embedded one that is not in the store yet is imported first. Training calls this.

    Raises:
        UserError: there is no such dataset, or its package is missing.
    """
    importer = IMPORTERS.get(name_or_path)
    if importer is not None and importer.embedded and not dataset_exists(name_or_path):
        try:
            return import_dataset(name_or_path)
        except UserError:
            # Workers may import at the same time; whoever came first has made the dataset.
            if not dataset_exists(name_or_path):
                raise
    return open_dataset(name_or_path)


def _name(source: Source) -> str:
    name = PurePosixPath(source.location).name
    for suffix in (".gz", ".tar", ".tgz", ".rec", ".bin", ".npz", ".parquet", ".csv", ".pt"):
        name = name.removesuffix(suffix)
    if not name or not name[0].isalnum() or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise UserError(f"{source.location} gives no name for a dataset", hint="--name NAME")
    return name


def _options(kind: str, model: type[Options], given: Mapping[str, Any]) -> Options:
    allowed = list(model.model_fields)
    for key in given:
        if key not in allowed:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in allowed)
            raise UserError(f"{kind} has no option --{key.replace('_', '-')}", allowed=options or "it has none")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{key} is {first['input']!r}: {first['msg']}", key=kind) from None
