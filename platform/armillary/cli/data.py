"""``armillary data``: what is in the store, and how to get more into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from armillary.data.store import Dataset

app = typer.Typer(help="List, import and inspect datasets.", no_args_is_help=True, add_completion=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command("list")
def list_stored(as_json: AsJson = False) -> None:
    """List the datasets in the store, and those that can be imported."""
    from armillary.cli.console import print_json, print_table, table
    from armillary.data.importers import IMPORTERS
    from armillary.data.store import list_datasets

    stored = list_datasets()
    names = {dataset.name for dataset in stored}
    if as_json:
        importers = {
            kind: {"summary": importer.summary, "embedded": importer.embedded} for kind, importer in IMPORTERS.items()
        }
        print_json({"datasets": [_summary(dataset) for dataset in stored], "importers": importers})
        return
    rows: list[tuple[object, ...]] = [
        (dataset.name, dataset.manifest.images, len(dataset.manifest.class_names), _size(dataset), "in the store")
        for dataset in stored
    ]
    for kind, importer in IMPORTERS.items():
        if kind not in names:
            how = "imported on first use" if importer.embedded else f"armillary data import {kind} SOURCE"
            rows.append((kind, None, None, importer.summary, how))
    print_table(table(["dataset", ("images", "right"), ("classes", "right"), "what", "state"], rows))


@app.command("import")
def import_one(
    kind: Annotated[str, typer.Argument(help="What to import: see `armillary data list`.")],
    source: Annotated[str | None, typer.Argument(help="The folder to import, for kinds that need one.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the store, a path or an s3:// URL.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a dataset into the store."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from armillary.cli.console import err, out, print_json
    from armillary.data.importers import import_dataset

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"importing {kind}", total=None)
        dataset = import_dataset(
            kind, name, source, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        print_json(_details(dataset))
        return
    manifest = dataset.manifest
    out.print(
        f"imported {manifest.name}: {manifest.images} images of {len(manifest.class_names)} classes, {_size(dataset)}, "
        f"in {dataset.location}",
        markup=False,
        soft_wrap=True,
    )
    left_out = dataset.quarantine()
    if left_out:
        err.print(f"{len(left_out)} files could not be read, the first: {left_out[0].file}: {left_out[0].reason}")
        err.print(f"all of them: armillary data inspect {manifest.name}", markup=False)


def _complete_dataset(incomplete: str) -> list[str]:
    from armillary.data.store import list_datasets

    return [dataset.name for dataset in list_datasets() if dataset.name.startswith(incomplete)]


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(help="A dataset's name, path or s3:// URL.", autocompletion=_complete_dataset)],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare the fingerprint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a dataset holds."""
    from armillary.cli.console import out, print_json, print_table, table
    from armillary.data.store import open_dataset

    dataset = open_dataset(name)
    if verify:
        dataset.verify()
    details = _details(dataset)
    if as_json:
        print_json(details | {"verified": verify})
        return
    per_class = details.pop("images_per_class")
    left_out = details.pop("left_out")
    fewest, most = min(per_class.values()), max(per_class.values())
    details["images per class"] = fewest if fewest == most else f"{fewest} to {most}"
    details["image shape"] = _size(dataset)
    del details["image_shape"]
    details["columns"] = ", ".join(details["columns"]) or "none beside image, label and index"
    if verify:
        details["verified"] = "the content is what was imported"
    print_table(table(["", ""], [(key, value) for key, value in details.items() if value != ""]))
    if left_out:
        out.print()
        print_table(table(["left out", "why"], [(item["file"], item["reason"]) for item in left_out]))


def _size(dataset: Dataset) -> str:
    shape = dataset.manifest.image_shape
    if shape is None:
        return "images of several sizes"
    height, width, channels = shape
    return f"{height} x {width} px, {'grey' if channels == 1 else f'{channels} channels'}"


def _summary(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "name": manifest.name,
        "images": manifest.images,
        "classes": len(manifest.class_names),
        "image_shape": manifest.image_shape,
        "fingerprint": manifest.fingerprint,
        "location": dataset.location,
    }


def _details(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return _summary(dataset) | {
        "columns": dict(manifest.columns),
        "images_per_class": dict(zip(manifest.class_names, manifest.histogram, strict=True)),
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "credits": manifest.credits,
        "licence": manifest.licence,
        "left_out": [vars(item) for item in dataset.quarantine()],
    }
