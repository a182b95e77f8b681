"""``armillary evaluate``: judge a finished run again, or embeddings made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.console import out, print_json, print_note, print_table, table
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    from armillary.evaluation.result import ProtocolResult

app = typer.Typer(help="Judge a finished run, or a file of embeddings and labels.", add_completion=False)


@app.command()
def evaluate(
    run: Annotated[str | None, typer.Argument(help="A run's id, or an unambiguous beginning of it.")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="An .npz or .parquet file with embeddings (n, d) and labels (n,).")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="With --embeddings: such a file of the training part, for knn, probe, few_label."),
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option("--protocol", "-p", help="A protocol; repeat for several. Default: the job's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Fixes what protocols draw. Default: the run's, or 0.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    plots: Annotated[
        Path | None, typer.Option(help="Write curves (.npz) and pictures (.png) into this folder.")
    ] = None,
) -> None:
    """Judges a finished run, or a file of embeddings and labels.

    Nothing is written unless --plots names a folder; the run's own record stays as it is.
    """
    if (run is None) == (embeddings is None):
        raise UserError("give either a run or --embeddings FILE", hint="armillary evaluate --help")
    if run is not None:
        if train is not None:
            raise UserError("a run brings its own training part", where="--train", hint="leave it out")
        subject, seed, results = _judge_run(run, protocol, seed)
    else:
        assert embeddings is not None
        subject, seed = str(embeddings), seed or 0
        results = _judge_file(embeddings, train, protocol, seed)
    metrics = {name: value for result in results.values() for name, value in result.metrics.items()}
    written = _write_plots(results, subject, plots) if plots is not None else []
    if as_json:
        print_json({"subject": subject, "seed": seed, "metrics": metrics, "files": [str(path) for path in written]})
        return
    rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
    print_table(table(("metric", ("value", "right")), rows, title=subject))
    if written:
        out.print(f"\nwrote {', '.join(path.name for path in written)} to {plots}", markup=False, soft_wrap=True)


def _judge_file(path: Path, train: Path | None, names: list[str] | None, seed: int) -> dict[str, ProtocolResult]:
    from armillary.evaluation import protocols
    from armillary.evaluation.files import read_embeddings
    from armillary.spec.jobs import EvaluateSpec

    chosen = names or list(EvaluateSpec().protocols)
    for name in chosen:
        needs_train = protocols.get(name, where="--protocol").requirements.needs_train
        if needs_train and train is None:
            raise UserError(f"{name} needs training embeddings", where="--protocol", hint="add --train FILE")
    points, labels = read_embeddings(path)
    gallery: tuple[Any, Any] = (None, None) if train is None else read_embeddings(train)
    options = {"train_embeddings": gallery[0], "train_labels": gallery[1], "seed": seed}
    return {name: protocols.evaluate(name, points, labels, **options) for name in chosen}


def _judge_run(run_id: str, names: list[str] | None, seed: int | None) -> tuple[str, int, dict[str, ProtocolResult]]:
    """The run's id, the seed used, and the results: with the job's protocols and seed, those of its training."""
    from armillary.data.splits import prepare
    from armillary.evaluation.suite import check_protocols, evaluate_encoder
    from armillary.spec.jobs import TrainJob
    from armillary.spec.loading import load_job
    from armillary.training.model import load_encoder
    from armillary.training.rundir import RunDirectory

    directory = RunDirectory.find(run_id)
    job = load_job(directory.path / "job.yaml", kind="train")
    assert isinstance(job, TrainJob)
    encoder = load_encoder(directory)
    chosen = names or list(job.evaluate.protocols)
    check_protocols(chosen, job.data.split, where="--protocol" if names else None)
    print_note(f"embedding {job.data.name}, fold {job.data.fold}")
    data = prepare(job.data, seed=job.seed)
    seed = job.seed if seed is None else seed
    results = evaluate_encoder(
        encoder,
        data,
        chosen,
        batch_size=job.evaluate.batch_size,
        flip=job.evaluate.flip,
        seed=seed,
    )
    return directory.run_id, seed, results


def _write_plots(results: dict[str, ProtocolResult], subject: str, folder: Path) -> list[Path]:
    from armillary.evaluation.figures import save_cmc_png, save_roc_png
    from armillary.evaluation.suite import save_curves

    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder", where=f"--plots {folder}")
    written = save_curves(results, folder)
    name = Path(subject).name
    if "verification" in results:
        curves = results["verification"].curves
        save_roc_png({name: [(curves["roc_far"], curves["roc_tar"])]}, folder / "roc.png")
        written.append(folder / "roc.png")
    if "identification" in results:
        save_cmc_png({name: [results["identification"].curves["cmc"]]}, folder / "cmc.png")
        written.append(folder / "cmc.png")
    return written
