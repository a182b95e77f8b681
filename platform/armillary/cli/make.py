"""``armillary data make``: data sets that are generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import ValidationError

    from armillary.spec.errors import UserError

app = typer.Typer(help="Generate datasets.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Generate datasets."""


def _option(name: str, default: object, text: str) -> Any:
    # The default belongs to the specification, whose module is imported when it is needed; a test compares the two.
    return typer.Option(name, help=text, show_default=str(default))


@app.command("identities")
def make_identities(
    name: Annotated[str, typer.Option(help="Its name in the store, a path or an s3:// URL.")],
    identities: Annotated[int | None, _option("--identities", 200, "How many people.")] = None,
    images: Annotated[int | None, _option("--images", 20, "Images a person; with a long tail, of the first.")] = None,
    size: Annotated[int | None, _option("--size", 64, "Pixels a side, 32 to 112.")] = None,
    channels: Annotated[int | None, _option("--channels", 3, "3, or 1 for grey.")] = None,
    difficulty: Annotated[float | None, _option("--difficulty", 0.5, "0 a studio, 1 a surveillance camera.")] = None,
    mask_share: Annotated[float | None, _option("--mask-share", 0.08, "Share of images with a face mask.")] = None,
    glasses: Annotated[float | None, _option("--glasses", 0.25, "Share of people who wear glasses.")] = None,
    low_res_share: Annotated[
        float | None, _option("--low-res-share", 0.2, "Share of images of low resolution.")
    ] = None,
    noise_flip: Annotated[
        float | None, _option("--noise-flip", 0.0, "Share of images with another person's label.")
    ] = None,
    noise_outlier: Annotated[
        float | None, _option("--noise-outlier", 0.0, "Share of images that show a stranger.")
    ] = None,
    noise_split: Annotated[
        float | None, _option("--noise-split", 0.0, "Share of images under a second label of their person.")
    ] = None,
    long_tail: Annotated[
        float | None, _option("--long-tail", 0.0, "g: class c has images * (c + 1)^-g of them, two at least.")
    ] = None,
    sequence_length: Annotated[int | None, _option("--sequence-length", 0, "Frames a video; 0 for stills.")] = None,
    sets: Annotated[int | None, _option("--sets", 0, "Images an image set; 0 for none.")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Add the table `graph`: who looks like whom.")] = False,
    neighbours: Annotated[int | None, _option("--neighbours", 5, "Edges the graph draws from each person.")] = None,
    seed: Annotated[int | None, _option("--seed", 0, "Another seed makes other people.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Generate procedural faces with their pose, quality, masks, captions, sets, videos and label noise."""
    from pydantic import ValidationError
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from armillary.cli.console import err, out, print_json
    from armillary.data import identities as generator

    given: dict[str, Any] = {
        "identities": identities,
        "images_per_identity": images,
        "size": size,
        "channels": channels,
        "difficulty": difficulty,
        "mask_share": mask_share,
        "glasses": glasses,
        "low_res_share": low_res_share,
        "noise": _told({"flip": noise_flip, "outlier": noise_outlier, "split": noise_split}),
        "long_tail": long_tail,
        "sequence_length": sequence_length,
        "sets": sets,
        "graph": graph,
        "neighbours": neighbours,
        "seed": seed,
    }
    try:
        spec = generator.IdentitiesSpec.model_validate(_told(given))
    except ValidationError as error:
        raise _mistake(error) from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("generating faces", total=None)
        dataset = generator.make_identities(
            name, spec, lambda done, total: bar.update(task, completed=done, total=total)
        )
    manifest = dataset.manifest
    if as_json:
        print_json(
            {
                "name": manifest.name,
                "images": manifest.images,
                "classes": len(manifest.class_names),
                "image_shape": manifest.image_shape,
                "columns": dict(manifest.columns),
                "tables": sorted(manifest.tables),
                "fingerprint": manifest.fingerprint,
                "location": dataset.location,
                "spec": spec.model_dump(),
            }
        )
        return
    summary = f"{manifest.images} images of {spec.identities} people, {spec.size} x {spec.size} px"
    out.print(f"made {manifest.name}: {summary}, in {dataset.location}", markup=False, soft_wrap=True)


def _told(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _mistake(error: ValidationError) -> UserError:
    """The first thing wrong, in the words of the command line."""
    from armillary.spec.errors import UserError

    first = error.errors()[0]
    option = "-".join(str(part) for part in first["loc"]).replace("_", "-").replace("images-per-identity", "images")
    return UserError(
        f"found {first['input']!r}: {first['msg']}", where="armillary data make identities", key=f"--{option}"
    )
