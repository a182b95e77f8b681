"""The page a study leaves behind: the question, the answer with its uncertainty, the table, the ROC curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from armillary.evaluation.figures import box_figure, line_figure, point_figure, roc_figure
from armillary.evaluation.report import Code, Heading, Paragraph, Plot, Section, Table, html_page
from armillary.spec.jobs import StudyJob
from armillary.spec.loading import dump_job
from armillary.sweeps import against
from armillary.sweeps.axis import lines
from armillary.sweeps.studies import REPORT, StudyResult
from armillary.tracking import format as shown
from armillary.tracking.leaderboard import Board, Group
from armillary.tracking.query import group_board
from armillary.tracking.uncertainty import difference
from armillary.training.rundir import RunDirectory, RunRecord

# Fewer runs a variant than this make no box.
BOX_RUNS = 3


def study_board(job: StudyJob, result: StudyResult) -> Board:
    """The leaderboard of one study's runs by its first metric; each group goes by the name of its variant."""
    board = group_board(job.metrics[0], result.group)
    named = (replace(group, label=group.variant, config="") if group.variant else group for group in board.groups)
    return replace(board, groups=tuple(named), also=job.metrics[1:])


def answers(job: StudyJob, board: Board) -> list[str]:
    """What the study found: on the two variants it compares, a sentence a metric; on two metrics, what they do."""
    found = against.sentences(job, board)
    if job.compare is None:
        return found
    first, second = (_variant(board, name) for name in job.compare)
    sentences = []
    for metric in job.metrics:
        if metric not in first.metrics or metric not in second.metrics:
            continue
        a, b = (_values(group, metric) for group in (first, second))
        gap = difference(a, b)
        names = f"{job.compare[0]} minus {job.compare[1]} in {metric}"
        sentences.append(f"{names}: {gap.mean:+.4f}; {against.verdict(gap)}.")
    return sentences + found


def marks(job: StudyJob, records: Sequence[RunRecord]) -> list[str]:
    """A sentence for each variant with runs that are marked, e.g. as collapsed: how many, and why the first one is."""
    sentences = []
    for variant in job.variants:
        runs = [record for record in records if record.variant == variant.name]
        marked = [record for record in runs if record.warnings]
        if marked:
            sentences.append(f"{variant.name}: {len(marked)} of {len(runs)} runs are marked, {marked[0].warnings[0]}.")
    return sentences


def _variant(board: Board, name: str) -> Group:
    return next(group for group in board.groups if group.variant == name)


def _values(group: Group, metric: str) -> dict[tuple[int, int], float]:
    return {
        pair: RunDirectory.find(run_id).record().metrics[metric]
        for pair, run_id in zip(sorted(group.values), group.run_ids, strict=True)
    }


def write_report(job: StudyJob, result: StudyResult, *, extra: Sequence[Section] = ()) -> Path:
    """Writes ``report.html`` into the study's folder; one file, no network needed to read it.

    Args:
        job: the study.
        result: its runs.
        extra: sections shown after the answer, e.g. what a sweep before it chose.
    """
    board = study_board(job, result)
    sections: list[Section] = [Paragraph(job.question)] if job.question else []
    sections += [Paragraph(sentence, strong=True) for sentence in answers(job, board)]
    sections += [Paragraph(sentence) for sentence in marks(job, result.records)]
    sections += list(extra)
    sections += _along_axis(job, result.records)
    sections += _boxes(job, result.records)
    sections += _against(job, board, result.records)
    sections += [Heading("Leaderboard"), _table(board), *(Paragraph(line) for line in shown.legend(board))]
    curves = _roc_curves(result.records)
    if curves:
        caption = "True accept rate against false accept rate on people never trained on; mean and range over runs"
        sections += [Heading("Verification"), Plot(roc_figure(curves), caption=caption)]
    sections += [Heading("How it was made"), Code(dump_job(job), caption="the study")]
    path = result.folder / REPORT
    path.write_text(html_page(job.name, sections))
    return path


def _along_axis(job: StudyJob, records: Sequence[RunRecord]) -> list[Section]:
    """Where the study has an axis: the metrics plotted over it, and what each does from end to end."""
    sections: list[Section] = []
    for metric in job.metrics if job.axis else ():
        assert job.axis is not None
        found = lines(job, records, metric)
        if found:
            caption = f"{metric} over {job.axis}: mean and range over runs"
            figure = line_figure({line.name: line.values for line in found}, x=job.axis, y=metric)
            sections += [Heading(f"{metric} over {job.axis}"), Plot(figure, caption=caption)]
            sections += [Paragraph(line.sentence(job.axis, metric)) for line in found]
    return sections


def _by_variant(job: StudyJob, records: Sequence[RunRecord], metric: str) -> dict[str, list[float]]:
    """Each variant's values, in the order of the study."""
    found = {
        variant.name: [r.metrics[metric] for r in records if r.variant == variant.name and metric in r.metrics]
        for variant in job.variants
    }
    return {name: values for name, values in found.items() if values}


def _boxes(job: StudyJob, records: Sequence[RunRecord]) -> list[Section]:
    """A box plot of the first metric, where variants have runs enough."""
    values = _by_variant(job, records, job.metrics[0])
    if not values or min(map(len, values.values())) < BOX_RUNS:
        return []
    caption = f"{job.metrics[0]} of each variant: median, quartiles, whiskers to 1.5 of their distance, and every run"
    return [Heading(f"{job.metrics[0]} by variant"), Plot(box_figure(values, y=job.metrics[0]), caption=caption)]


def _against(job: StudyJob, board: Board, records: Sequence[RunRecord]) -> list[Section]:
    """Where the study asks for it: two metrics of each variant, as points."""
    if job.against is None:
        return []
    x, y = (_by_variant(job, records, metric) for metric in job.against)
    points = {name: (x[name], y[name]) for name in x if name in y}
    if not points:
        return []
    shades = against.shades(job, board)
    caption = (
        f"{job.against[1]} over {job.against[0]}: the mean of each variant's runs, bars from the lowest to the highest"
    )
    if shades is not None:
        caption += f"; the colour is {job.metrics[0]}"
    figure = point_figure(points, x=job.against[0], y=job.against[1], shades=shades, shade=job.metrics[0])
    return [Heading(f"{job.against[1]} over {job.against[0]}"), Plot(figure, caption=caption)]


def _table(board: Board) -> Table:
    columns = shown.columns(board)
    rows = [
        [
            f"{group.variant or group.label} {shown.MARKS[group.verdict]}".rstrip(),
            len(group.run_ids),
            len(group.folds),
            len(group.seeds),
            *(shown.summary(group.metrics.get(column)) for column in columns),
        ]
        for group in board.groups
    ]
    headings = ["variant", "runs", "folds", "seeds", *(shown.short(column) for column in columns)]
    return Table(headings, rows, caption=board.title, highlight=0)


def _roc_curves(records: Sequence[RunRecord]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for record in records:
        path = RunDirectory.find(record.run_id).path / "evaluation" / "verification.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                curves[record.variant or record.name].append((stored["roc_far"], stored["roc_tar"]))
    return dict(curves)
