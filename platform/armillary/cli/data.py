"""``armillary data``: what is in the store, how to get more into it, and whether it is still what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli import make
from armillary.spec.errors import WorkFailed

if TYPE_CHECKING:
    from armillary.data.importers import Importer
    from armillary.data.store import Dataset

app = typer.Typer(help="List, import, inspect and verify datasets.", no_args_is_help=True, add_completion=False)
app.add_typer(make.app, name="make")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _complete_dataset(incomplete: str) -> list[str]:
    # Folder names only: reading every manifest would make the shell wait.
    from armillary.spec.home import datasets_dir

    return sorted(path.parent.name for path in datasets_dir().glob(f"{incomplete}*/manifest.json"))


def _complete_kind(incomplete: str) -> list[str]:
    from armillary.data.importers import IMPORTERS

    return [kind for kind in IMPORTERS if kind.startswith(incomplete)]


DatasetName = Annotated[
    str, typer.Argument(help="A dataset's name, path or s3:// URL.", autocompletion=_complete_dataset)
]


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


@app.command()
def kinds(as_json: AsJson = False) -> None:
    """List what can be imported, and the options of each kind."""
    from armillary.cli.console import print_json, print_table, table
    from armillary.data.importers import IMPORTERS

    if as_json:
        print_json({kind: _kind(importer) for kind, importer in IMPORTERS.items()})
        return
    rows: list[tuple[object, ...]] = []
    for kind, importer in IMPORTERS.items():
        rows.append((kind, "" if importer.embedded else "SOURCE", importer.summary))
        for name, field in importer.options.model_fields.items():
            rows.append(
                ("", f"--{name.replace('_', '-')}", f"{field.description} (default: {_default(field.default)})")
            )
    print_table(table(["kind", "takes", "what"], rows))


@app.command("import")
def import_one(
    kind: Annotated[
        str, typer.Argument(help="What to import: see `armillary data kinds`.", autocompletion=_complete_kind)
    ],
    source: Annotated[str | None, typer.Argument(help="A file, folder or s3:// URL, for kinds that need one.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the store, a path or an s3:// URL.")] = None,
    form: Annotated[str | None, typer.Option(help="encoded: keep the files' bytes; pixels: decode now.")] = None,
    part: Annotated[str | None, typer.Option(help="idx: all, train or t10k.")] = None,
    pairs: Annotated[str | None, typer.Option(help="lfw: the list of pairs, inside SOURCE.")] = None,
    images: Annotated[str | None, typer.Option(help="ijb, pairs-csv, captions-csv: the folder of images.")] = None,
    templates: Annotated[str | None, typer.Option(help="ijb: the list of templates, inside SOURCE.")] = None,
    matches: Annotated[str | None, typer.Option(help="ijb: the list of comparisons, inside SOURCE.")] = None,
    image_column: Annotated[str | None, typer.Option(help="parquet, captions-csv: the column of images.")] = None,
    label_column: Annotated[str | None, typer.Option(help="parquet, captions-csv, ego: the column of classes.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="captions-csv: the column of texts.")] = None,
    first_column: Annotated[str | None, typer.Option(help="pairs-csv: the column of first images.")] = None,
    second_column: Annotated[str | None, typer.Option(help="pairs-csv: the column of second images.")] = None,
    same_column: Annotated[str | None, typer.Option(help="pairs-csv: the column of answers.")] = None,
    fold_column: Annotated[str | None, typer.Option(help="pairs-csv: the column of folds.")] = None,
    label_key: Annotated[str | None, typer.Option(help="webdataset: the label's key in .json members.")] = None,
    images_key: Annotated[str | None, typer.Option(help="npz: the array of images.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="npz: the array of labels.")] = None,
    layout: Annotated[str | None, typer.Option(help="npz: auto, NHWC or NCHW.")] = None,
    separator: Annotated[str | None, typer.Option(help="edges, ego: auto, comma, tab, semicolon or space.")] = None,
    header: Annotated[str | None, typer.Option(help="edges, ego: auto, yes or no: does a line name columns?")] = None,
    nodes: Annotated[str | None, typer.Option(help="ego: a CSV beside SOURCE: node, label, features.")] = None,
    hops: Annotated[int | None, typer.Option(help="ego, pyg: how far a neighbourhood reaches.")] = None,
    max_nodes: Annotated[int | None, typer.Option(help="ego, tu, pyg: of a graph.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="parquet, npz: more columns to keep, NAME or NAME=NEW_NAME, with commas.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import a dataset into the store; repeated after an interruption, it goes on."""
    from armillary.cli.console import err, out, print_json
    from armillary.data.importers import import_dataset

    given: dict[str, object | None] = {
        "form": form, "part": part, "pairs": pairs, "images": images, "templates": templates, "matches": matches,
        "image_column": image_column, "label_column": label_column, "caption_column": caption_column,
        "first_column": first_column, "second_column": second_column, "same_column": same_column,
        "fold_column": fold_column, "label_key": label_key, "images_key": images_key, "labels_key": labels_key,
        "layout": layout, "separator": separator, "header": header, "nodes": nodes, "hops": hops,
        "max_nodes": max_nodes,
        "columns": None if columns is None else tuple(columns.split(",")),
    }  # fmt: skip
    options = {key: value for key, value in given.items() if value is not None}
    with _bar(f"importing {kind}") as report:
        try:
            dataset = import_dataset(kind, name, source, report, options)
        except OSError as error:
            # A full disk or a lost connection: what is complete stays, and the same command takes it over.
            raise WorkFailed(f"the import stopped: {error}; repeat the command to go on") from error
    if as_json:
        print_json(_details(dataset))
        return
    manifest, classes = dataset.manifest, len(dataset.manifest.class_names)
    out.print(
        f"imported {manifest.name}: {manifest.images} images of {classes} {'class' if classes == 1 else 'classes'}, "
        f"{_size(dataset)}, in {dataset.location}",
        markup=False,
        soft_wrap=True,
    )
    left_out = dataset.quarantine()
    if left_out:
        first = f"the first: {left_out[0].file}: {left_out[0].reason}"
        err.print(f"{len(left_out)} files could not be read, {first}", markup=False, soft_wrap=True)
        err.print(f"all of them: armillary data inspect {manifest.name}", markup=False)


@app.command()
def relate(
    dataset: DatasetName,
    edges: Annotated[str, typer.Argument(help="A text file of edges: first, second[, weight].")],
    name: Annotated[str, typer.Option(help="Of the copy that says who is near whom.")],
    by: Annotated[str, typer.Option(help="class: edges join names of classes; sample: positions, from 0.")] = "class",
    as_json: AsJson = False,
) -> None:
    """Copy a dataset and add who is near whom, from an edge list: for the term graph_constraint."""
    from armillary.cli.console import out, print_json
    from armillary.data.relations import relate as write

    made = write(dataset, edges, name, by=by)
    if as_json:
        print_json(_details(made))
        return
    edges_there = made.manifest.tables["graph" if by == "class" else "sample_graph"].rows
    out.print(f"{made.name}: {dataset} with {edges_there // 2} edges, in {made.location}", markup=False, soft_wrap=True)


@app.command()
def inspect(
    name: DatasetName,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare the fingerprint.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG with images from all over the dataset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a dataset holds: counts, class balance, sizes, columns, tables, and what was left out."""
    from armillary.cli.console import out, print_json, print_note, print_table, table
    from armillary.data.store import open_dataset
    from armillary.data.summary import contact_sheet, describe

    dataset = open_dataset(name)
    if verify:
        _verify(dataset)
    if sheet is not None:
        count = contact_sheet(dataset, sheet)
        print_note(f"{count} images are shown in {sheet}")
    description = describe(dataset)
    details = _details(dataset)
    if as_json:
        balance = {"class_balance": description["classes"], "sizes": description["sizes"]}
        print_json(details | balance | {"column_ranges": description["columns"], "verified": verify})
        return
    rows = _overview(dataset, description)
    if verify:
        rows.append(("verified", "the content is what was imported"))
    print_table(table(["", ""], rows))
    columns, tables = description["columns"].items(), details["tables"].items()
    parts: list[tuple[list[str], list[tuple[object, ...]]]] = [
        (["column", "type", "values"], [(key, value["type"], _shown(value)) for key, value in columns]),
        (["table", "rows", "columns"], [(key, value["rows"], ", ".join(value["columns"])) for key, value in tables]),
        (["left out", "why"], [(item["file"], item["reason"]) for item in details["left_out"]]),
    ]
    for headings, lines in parts:
        if lines:
            out.print()
            print_table(table(headings, lines))


@app.command()
def verify(name: DatasetName, as_json: AsJson = False) -> None:
    """Read a dataset whole and compare its content with its fingerprint."""
    from armillary.cli.console import out, print_json
    from armillary.data.store import open_dataset

    dataset = open_dataset(name)
    _verify(dataset)
    if as_json:
        print_json({"name": dataset.name, "fingerprint": dataset.fingerprint, "verified": True})
        return
    text = f"{dataset.name}: all {len(dataset)} images are what was imported, fingerprint {dataset.fingerprint}"
    out.print(text, markup=False, soft_wrap=True)


def _verify(dataset: Dataset) -> None:
    with _bar(f"reading {dataset.name}") as report:
        dataset.verify(report)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar over images, with their rate."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from armillary.cli.console import err

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(show_speed=True))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _overview(dataset: Dataset, description: dict[str, Any]) -> list[tuple[object, ...]]:
    manifest, classes, sizes = dataset.manifest, description["classes"], description["sizes"]
    balance = f"{classes['min']} to {classes['max']}, median {classes['median']:g}"
    several = {side: f"{value['min']} to {value['max']}" for side, value in sizes.items()}
    size = _size(dataset) if manifest.image_shape else f"height {several['height']} px, width {several['width']} px"
    rows: list[tuple[object, ...]] = [
        ("name", manifest.name),
        ("location", dataset.location),
        ("images", f"{manifest.images}, {'encoded' if manifest.form == 'encoded' else 'decoded'}, {size}"),
        ("classes", f"{len(manifest.class_names)}, {classes['empty']} without images, {classes['single']} with one"),
        ("images per class", str(classes["min"]) if classes["min"] == classes["max"] else balance),
        ("class balance", f"{classes['effective']:.1f} effective classes, Gini {classes['gini']:.3f}"),
        ("stored as", f"{len(manifest.shards)} shards, {sum(shard.size for shard in manifest.shards):,} bytes"),
        ("fingerprint", manifest.fingerprint),
        ("credits", manifest.credits),
        ("licence", manifest.licence),
        ("left out", str(manifest.quarantined) if manifest.quarantined else ""),
    ]
    return [row for row in rows if row[1] != ""]


def _shown(value: dict[str, Any]) -> str:
    def text(item: object) -> str:
        return f"{item:.4g}" if isinstance(item, float) else ", ".join(item) if isinstance(item, list) else str(item)

    return ", ".join(f"{name.replace('_', ' ')} {text(item)}" for name, item in value.items() if name != "type")


def _kind(importer: Importer) -> dict[str, Any]:
    schema = importer.options.model_json_schema()
    return {"summary": importer.summary, "embedded": importer.embedded, "options": schema.get("properties", {})}


def _default(value: object) -> str:
    return "none" if value in ("", ()) else str(value)


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
        "form": manifest.form,
        "fingerprint": manifest.fingerprint,
        "location": dataset.location,
    }


def _details(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return _summary(dataset) | {
        "columns": dict(manifest.columns),
        "tables": {name: entry.model_dump() for name, entry in manifest.tables.items()},
        "images_per_class": dict(zip(manifest.class_names, manifest.histogram, strict=True)),
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "credits": manifest.credits,
        "licence": manifest.licence,
        "left_out": [vars(item) for item in dataset.quarantine()],
    }
