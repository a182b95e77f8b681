"""``armillary evaluate``: judge a finished run again, on its own data or other, or embeddings made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armillary.cli.console import err, number, out, print_json, print_note, print_table, table
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from armillary.evaluation.result import ProtocolResult
    from armillary.spec.jobs import TrainJob

app = typer.Typer(help="Judge a finished run, or a file of embeddings and labels.", add_completion=False)


@dataclass(frozen=True)
class Files:
    """What stands beside a file of embeddings."""

    train: Path | None
    pairs: Path | None
    templates: Path | None
    matches: Path | None

    def check_absent(self) -> None:
        """Refuses them beside a run, which brings its own."""
        for name, path in vars(self).items():
            if path is not None:
                problem = "goes with --embeddings; a run brings its own training part and tables"
                raise UserError(problem, where=f"--{name}", hint="leave it out")


@app.command()
def evaluate(
    run: Annotated[str | None, typer.Argument(help="A run's id, or an unambiguous beginning of it.")] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="An .npz or .parquet file: embeddings (n, d), labels (n,), and columns such as quality."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="With --embeddings: such a file of the training part, for knn, probe, few_label..."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="With --embeddings: .npz, .csv or .parquet with first, second (rows), same[, fold]."),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="With --embeddings: the same with row, template, media[, gallery].")
    ] = None,
    matches: Annotated[
        Path | None, typer.Option(help="With --templates: the same with first, second (templates), same.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With a run: judge it on the whole of this dataset, by its pairs or templates.")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="With a run: average with the mirrored image. Default: the job's."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", "--protocols", "-p", help="Protocols, repeated or a,b. Default: the job's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Fixes what protocols draw. Default: the run's, or 0.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    figures: Annotated[
        Path | None, typer.Option("--figures", "--plots", help="Write curves (.npz), pictures (.png) into this folder.")
    ] = None,
) -> None:
    """Judges a finished run, or a file of embeddings and labels.

    Nothing is written unless --figures names a folder; the run's own record stays as it is.
    """
    from armillary.evaluation.suite import metrics_of, save_curves, warnings_of

    if (run is None) == (embeddings is None):
        raise UserError("give either a run or --embeddings FILE", hint="armillary evaluate --help")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise UserError("is not a folder", where=f"--figures {figures}")
    names = [name for group in protocol or () for name in group.split(",") if name] or None
    files = Files(train, pairs, templates, matches)
    if run is not None:
        files.check_absent()
        subject, seed, results = _judge_run(run, names, seed, data, flip)
    else:
        assert embeddings is not None
        if data is not None:
            raise UserError("goes with a run; a file of embeddings is judged as it is", where="--data")
        if flip is not None:
            raise UserError("goes with a run; a file holds no images to mirror", where="--flip")
        subject, seed = str(embeddings), seed or 0
        results = _judge_file(embeddings, files, names, seed)
    metrics, warnings = metrics_of(results), warnings_of(results)
    written = save_curves(results, figures, name=Path(subject).name) if figures is not None else []
    if as_json:
        listed = [str(path) for path in written]
        print_json({"subject": subject, "seed": seed, "metrics": metrics, "warnings": warnings, "files": listed})
        return
    rows = [(name, number(value)) for name, value in metrics.items()]
    print_table(table(("metric", ("value", "right")), rows, title=subject))
    for sentence in warnings:
        err.print(f"warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
    if written:
        out.print(f"\nwrote {', '.join(path.name for path in written)} to {figures}", markup=False, soft_wrap=True)


def _judge_file(path: Path, files: Files, names: list[str] | None, seed: int) -> dict[str, ProtocolResult]:
    from armillary.evaluation import protocols
    from armillary.evaluation.files import read_embedding_file
    from armillary.evaluation.tables import read_pairs, read_templates
    from armillary.spec.jobs import EvaluateSpec

    if files.matches is not None and files.templates is None:
        raise UserError("compares templates, and there are none", where="--matches", hint="add --templates FILE")
    # A file of templates without a word about protocols asks for the one it is for.
    chosen = names or (["templates"] if files.templates is not None else list(EvaluateSpec().protocols))
    for name in chosen:
        needs_train = protocols.get(name, where="--protocol").requirements.needs_train
        if needs_train and files.train is None:
            raise UserError(f"{name} needs training embeddings", where="--protocol", hint="add --train FILE")
    judged = read_embedding_file(path)
    gallery = None if files.train is None else read_embedding_file(files.train)
    pairs = None if files.pairs is None else read_pairs(files.pairs)
    templates = None if files.templates is None else read_templates(files.templates, files.matches)
    return {
        name: protocols.evaluate(
            name,
            judged.embeddings,
            judged.labels,
            train_embeddings=None if gallery is None else gallery.embeddings,
            train_labels=None if gallery is None else gallery.labels,
            columns=judged.columns,
            pairs=pairs,
            templates=templates,
            seed=seed,
        )
        for name in chosen
    }


def _judge_run(
    run_id: str, names: list[str] | None, seed: int | None, dataset: str | None, flip: bool | None
) -> tuple[str, int, dict[str, ProtocolResult]]:
    """The run's id, the seed used, and the results: with the job's protocols and seed, those of its training."""
    from armillary.data.inputs import as_inputs
    from armillary.data.splits import prepare
    from armillary.evaluation.suite import check_protocols, evaluate_encoder
    from armillary.spec.jobs import TrainJob
    from armillary.spec.loading import load_job
    from armillary.training.model import load_encoder, load_tokenizer
    from armillary.training.preflight import check_modality_of_protocols, needs_of
    from armillary.training.rundir import RunDirectory

    directory = RunDirectory.find(run_id)
    job = load_job(directory.path / "job.yaml", kind="train")
    assert isinstance(job, TrainJob)
    if flip is not None:
        job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"flip": flip})})
    encoder = load_encoder(directory)
    chosen = names or list(job.evaluate.protocols)
    seed = job.seed if seed is None else seed
    needs = needs_of(job)
    check_modality_of_protocols(chosen, needs, job.objective.name, None, "--protocol")
    if dataset is not None and needs.modality == "interactions":
        problem = f"{job.objective.name} embeds the users and items of {job.data.name}, and knows no others"
        raise UserError(problem, where="--data", hint="leave --data out")
    if dataset is not None:
        return directory.run_id, seed, _judge_elsewhere(encoder, job, dataset, chosen, seed)
    check_protocols(chosen, job.data.split, where="--protocol" if names else None)
    print_note(f"embedding {job.data.name}, fold {job.data.fold}")
    data = as_inputs(prepare(job.data, seed=job.seed), needs, job.data, load_tokenizer(directory))
    results = evaluate_encoder(
        encoder,
        data,
        chosen,
        batch_size=job.evaluate.batch_size,
        flip=job.evaluate.flip,
        seed=seed,
    )
    return directory.run_id, seed, results


def _judge_elsewhere(
    encoder: nn.Module, job: TrainJob, dataset: str, names: list[str], seed: int
) -> dict[str, ProtocolResult]:
    """Judges an encoder on the whole of a dataset that it was not trained on, at the size it was trained at.

    Its classes are new ones, unless a protocol asks for trained ones: then they are matched by name.
    """
    from armillary.data.splits import labels_by_name, prepare, whole
    from armillary.evaluation import protocols
    from armillary.evaluation.suite import check_protocols, judge

    if dataset == job.data.name:
        raise UserError(f"the run was trained on images of {dataset!r}", where="--data", hint="leave --data out")
    closed = [name for name in names if protocols.get(name, where="--protocol").requirements.closed_set]
    if not closed or job.data.split == "identity":
        check_protocols(names, "identity", where="--protocol")
    trained = prepare(job.data, seed=job.seed)
    channels, height, width = trained.train.images.shape[1:]
    images, tables = whole(job.data.model_copy(update={"name": dataset, "image_size": (height, width)}))
    if images.images.shape[1] != channels:
        problem = f"{dataset!r} has images of {images.images.shape[1]} channels, the run was trained on {channels}"
        raise UserError(problem, where="--data")
    if closed:
        labels = labels_by_name(job.data, dataset, images.label)
        if labels is None:
            problem = (
                f"{closed[0]} needs classes that were trained on; {dataset!r} and {job.data.name!r} share no class name"
            )
            raise UserError(problem, where="--data")
        images = replace(images, label=labels)
    print_note(f"embedding all of {dataset}")
    train = trained.train if any(protocols.requirements(name).needs_train for name in names) else None
    options = {"batch_size": job.evaluate.batch_size, "flip": job.evaluate.flip}
    return judge(encoder, images, tables, names, train=train, seed=seed, **options)
