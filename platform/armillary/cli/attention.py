"""``armillary attention``: does a transformer look at the person?"""

from __future__ import annotations

from typing import Annotated

import typer

from armillary.cli.console import number, print_json, print_note, print_table, table

app = typer.Typer(help="Compare where a transformer looks with where the person is.", add_completion=False)


@app.command()
def attention(
    run: Annotated[str, typer.Argument(help="A finished run of a vision transformer: its id, or a beginning of it.")],
    images: Annotated[int, typer.Option(help="People to look at, one image each.", min=2, max=100_000)] = 200,
    mass: Annotated[float, typer.Option(help="Share of the attention that makes a mask.", min=1e-6, max=1)] = 0.6,
    difficulty: Annotated[float, typer.Option(help="0: a studio; 1: a surveillance camera.", min=0, max=1)] = 0.5,
    seed: Annotated[int, typer.Option(help="Of people, scenes and the untrained network.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Overlap of the class token's attention with the person, on generated people that no training has seen.

    DINO's study: each head's fewest patches that hold the mass are a mask, and the best head counts (Jaccard index).
    Beside it stand the same network before training and a mask of the whole image. The picture is kept with the run.
    """
    from armillary.procedures.attention import AttentionOptions, judge_attention
    from armillary.tracking.run import track_finished
    from armillary.tracking.uncertainty import summarize
    from armillary.training.rundir import RunDirectory

    directory = RunDirectory.find(run)
    options = AttentionOptions(images=images, mass=mass, difficulty=difficulty, seed=seed)
    report = judge_attention(directory.run_id, options)
    track_finished(directory)
    gain = summarize((report.trained - report.untrained).tolist())
    summary = report.summary() | {"gain": gain.mean, "gain_half_width": gain.half_width}
    if as_json:
        print_json(summary)
        return
    rows = [
        ("this network", number(summary["trained"])),
        ("before training", number(summary["untrained"])),
        ("the whole image", number(summary["whole_image"])),
        ("gain of training", f"{gain.mean:+.4f} ± {gain.half_width or 0:.4f}"),
    ]
    print_table(table(("overlap with the person", ("Jaccard", "right")), rows, title=report.run_id))
    print_note(f"± is the 95% Student t interval over {images} images\npictures: {report.file}")
