"""``armillary invert``: draw what a trained network remembers of an identity."""

from __future__ import annotations

from typing import Annotated

import typer

from armillary.cli.console import err, print_json, print_note, print_table, table

app = typer.Typer(help="Draw what a trained network remembers of an identity.", add_completion=False)


@app.command()
def invert(
    run: Annotated[str, typer.Argument(help="A finished run with a class head: its id, or an unambiguous beginning.")],
    identity: Annotated[str, typer.Option(help="Number of a class of the dataset that was trained on, or its name.")],
    steps: Annotated[int, typer.Option(help="Optimisation steps.", min=1, max=100_000)] = 500,
    batch: Annotated[int, typer.Option(help="Pictures drawn together.", min=2, max=1024)] = 16,
    lr: Annotated[float, typer.Option(help="Step size.", min=1e-6, max=10)] = 0.25,
    bn: Annotated[float, typer.Option(help="Weight of the batch-norm statistics.", min=0, max=100)] = 0.1,
    tv: Annotated[float, typer.Option(help="Weight of the total variation.", min=0, max=10)] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the noise it starts from.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draws faces that the network takes for one of its training people, from its weights and statistics alone.

    The picture is kept with the run. What this means for privacy is in docs/inversion.md.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from armillary.procedures.inversion import InversionOptions, invert_run
    from armillary.tracking.run import track_finished
    from armillary.training.rundir import RunDirectory

    options = InversionOptions(steps=steps, batch=batch, lr=lr, bn=bn, tv=tv, seed=seed)
    directory = RunDirectory.find(run)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("drawing", total=steps)
        found = invert_run(directory.run_id, identity, options, lambda done: bar.update(task, completed=done))
    track_finished(directory)
    if as_json:
        print_json(found.summary())
        return
    rows = [
        ("mean cosine to the class center", f"{found.cosine:.3f}"),
        ("taken for this person", f"{found.recognised:.0%}"),
        ("other people whose mean image is less alike", f"{found.likeness:.0%}"),
        ("distance of the statistics", f"{found.statistics:.2f}"),
    ]
    print_table(table(("", ("", "right")), rows, title=f"class {found.identity} ({found.name})"))
    print_note(f"pictures: {found.files[0]}")
