"""Boards as a table for terminals, Markdown, CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from armillary.tracking.leaderboard import HEADLINE, SIGNIFICANCE, Board, Group
from armillary.tracking.uncertainty import CONFIDENCE, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType

Format = Literal["table", "md", "csv", "json", "latex"]

# Below this many columns only the ranking metric is shown.
_WIDE = 110

MARKS = {"best": "*", "tied": "=", "worse": "", "untested": "?"}

_SHORT = {
    "verification/auc": "AUC",
    "verification/eer": "EER",
    "verification/tar_at_far_1e-2": "TAR@1e-2",
    "verification/tar_at_far_1e-3": "TAR@1e-3",
    "identification/rank1": "rank-1",
    "knn/top1": "k-NN",
    "probe/top1": "probe",
}


def number(value: float, half_width: float | None = None) -> str:
    """A value with the digits its uncertainty leaves meaning to: three decimals, more only for tight intervals.

    Example:
        >>> number(0.97812, 0.0063), number(0.97812), number(0.97812, 0.00021)
        ('0.978 ± 0.006', '0.978', '0.97812 ± 0.00021')
    """
    if not math.isfinite(value):
        return str(value)
    size = math.floor(math.log10(abs(value))) if value else 0
    decimals = 3 if -2 <= size <= 0 else max(0, 3 - size)
    if half_width:
        # Two digits of an interval that three decimals would print as zero or nearly so.
        order = math.floor(math.log10(half_width))
        decimals = max(decimals if order >= -3 else 1 - order, 0)
    decimals = min(decimals, 9)
    text = f"{value:.{decimals}f}"
    return text if half_width is None else f"{text} ± {half_width:.{decimals}f}"


def summary(value: Summary | None) -> str:
    """A mean with its interval, or nothing."""
    return "" if value is None else number(value.mean, value.half_width)


def short(metric: str) -> str:
    """The heading of a metric's column."""
    return _SHORT.get(metric, metric)


def legend(board: Board) -> list[str]:
    """What the marks and intervals mean, and which tests were made; plain sentences."""
    tests = sorted({group.difference.test for group in board.groups if group.difference and group.p is not None})
    names = {"paired": "paired t-test over (fold, seed)", "welch": "Welch's t-test"}
    lines = [f"± is the {CONFIDENCE:.0%} Student t interval over runs."]
    if tests:
        made = " or ".join(names[test] for test in tests)
        lines.append(f"* best, = cannot be told apart from it ({made}, Holm-corrected, level {SIGNIFICANCE:g}).")
    if any(group.verdict == "untested" for group in board.groups):
        lines.append("? too few runs to compare with the best: add seeds or folds.")
    if board.skipped:
        runs = "1 run has" if board.skipped == 1 else f"{board.skipped} runs have"
        lines.append(f"{runs} no finite {board.metric} and {'is' if board.skipped == 1 else 'are'} left out.")
    return lines


def columns(board: Board) -> list[str]:
    """The ranking metric, those that the board asks for, and the headline metrics, where some group has them."""
    present = {name for group in board.groups for name in group.metrics}
    return list(dict.fromkeys([board.metric, *(name for name in (*board.also, *HEADLINE) if name in present)]))


def as_table(boards: Sequence[Board], width: int) -> RenderableType:
    """Tables for a terminal ``width`` columns wide; a narrow one gets fewer columns, not cut ones."""
    from rich.console import Group as Stack
    from rich.text import Text

    if not boards:
        return Text("no finished runs yet")
    parts: list[RenderableType] = []
    for board in boards:
        parts += [_rich_table(board, width), *(Text(line, style="dim") for line in legend(board)), Text("")]
    return Stack(*parts[:-1])


def _rich_table(board: Board, width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    wide = width >= _WIDE
    table = Table(title=board.title, title_justify="left", title_style="bold", box=None, header_style="bold")
    table.pad_edge = False
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    # Names fold where room is short; numbers never do.
    table.add_column("configuration", overflow="fold")
    metrics = columns(board) if wide else [board.metric]
    if wide:
        table.add_column("backbone", overflow="fold")
    for metric in metrics:
        table.add_column(short(metric), justify="right", no_wrap=True)
    for heading in ("runs", "folds", "seeds") if wide else ("runs",):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, group in enumerate(board.groups, start=1):
        style = "dim" if group.baseline else "bold" if group.verdict == "best" else ""
        cells = [str(rank), MARKS[group.verdict], _configuration(group)]
        if wide:
            cells.append(group.backbone)
        cells += [summary(group.metrics.get(metric)) for metric in metrics]
        cells += [str(count) for count in _counts(group)[: 3 if wide else 1]]
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def _counts(group: Group) -> tuple[int, int, int]:
    return len(group.run_ids), len(group.folds), len(group.seeds)


def _configuration(group: Group) -> str:
    head = f"{group.variant} ({group.label})" if group.variant and group.variant != group.label else group.label
    return f"{head} {group.config}".rstrip()


def as_markdown(boards: Sequence[Board]) -> str:
    """One pipe table a board, for READMEs and reports."""
    if not boards:
        return "no finished runs yet\n"
    parts = []
    for board in boards:
        metrics = columns(board)
        head = ["#", "", "configuration", "backbone", *map(short, metrics), "runs", "folds", "seeds"]
        lines = [f"**{board.title}**", "", _pipes(head)]
        lines.append("|" + "|".join(["--:", ":-:", "---", "---", *["--:"] * (len(metrics) + 3)]) + "|")
        lines += [_pipes(cells) for cells in _cells(board)]
        parts.append("\n".join([*lines, "", *(f"{line}  " for line in legend(board))]))
    return "\n\n".join(parts) + "\n"


def _cells(board: Board) -> list[list[str]]:
    return [
        [
            str(rank),
            MARKS[group.verdict],
            _configuration(group),
            group.backbone,
            *(summary(group.metrics.get(metric)) for metric in columns(board)),
            *map(str, _counts(group)),
        ]
        for rank, group in enumerate(board.groups, start=1)
    ]


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def as_latex(boards: Sequence[Board]) -> str:
    """One ``tabular`` a board, with the rules of the package booktabs."""
    parts = []
    for board in boards:
        metrics = columns(board)
        lines = [f"% {board.title}", "\\begin{tabular}{rcll" + "r" * (len(metrics) + 3) + "}", "\\toprule"]
        lines.append(_ampersands(["", "", "configuration", "backbone", *map(short, metrics), "runs", "folds", "seeds"]))
        lines += ["\\midrule", *(_ampersands(cells) for cells in _cells(board)), "\\bottomrule", "\\end{tabular}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"


def _tex(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(character, character) for character in text)


def as_csv(boards: Sequence[Board]) -> str:
    """One line a group with full precision; the metrics' columns are ``<metric>`` and ``<metric> ±``."""
    metrics: list[str] = []
    for board in boards:
        metrics += [name for name in columns(board) if name not in metrics]
    fixed = ["dataset", "split", "holdout", "fingerprint", "rank", "verdict", "test", "p"]
    fixed += ["label", "variant", "config", "backbone", "digest", "runs", "folds", "seeds"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*fixed, *(name for metric in metrics for name in (metric, f"{metric} ±"))])
    for board in boards:
        for rank, group in enumerate(board.groups, start=1):
            test = group.difference.test if group.difference and group.p is not None else ""
            row: list[Any] = [board.dataset, board.split, board.holdout, board.fingerprint, rank, group.verdict]
            row += [test, group.p, group.label, group.variant, group.config, group.backbone, group.digest]
            row += _counts(group)
            for metric in metrics:
                found = group.metrics.get(metric)
                row += [found.mean, found.half_width] if found else [None, None]
            writer.writerow(["" if cell is None else cell for cell in row])
    return file.getvalue()


def as_plain(boards: Sequence[Board]) -> list[dict[str, Any]]:
    """Boards as plain values for JSON, with every metric and the run ids."""
    return [
        {
            "dataset": board.dataset,
            "split": board.split,
            "holdout": board.holdout,
            "fingerprint": board.fingerprint,
            "metric": board.metric,
            "confidence": CONFIDENCE,
            "skipped": board.skipped,
            "groups": [{"rank": rank, **_plain(group)} for rank, group in enumerate(board.groups, start=1)],
        }
        for board in boards
    ]


def _plain(group: Group) -> dict[str, Any]:
    plain = {
        name: getattr(group, name)
        for name in ("label", "baseline", "variant", "config", "backbone", "digest", "verdict", "p")
    }
    plain["difference"] = asdict(group.difference) if group.difference else None
    plain |= {"folds": list(group.folds), "seeds": list(group.seeds), "runs": list(group.run_ids)}
    plain["values"] = [{"fold": fold, "seed": seed, "value": value} for (fold, seed), value in group.values.items()]
    plain["metrics"] = {name: asdict(value) for name, value in group.metrics.items()}
    return plain


def as_json(boards: Sequence[Board]) -> str:
    """:func:`as_plain` as text."""
    return json.dumps(as_plain(boards), indent=2) + "\n"
