"""Progress of one run or many: a bar on a terminal; elsewhere, in a log say, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from armillary.cli.console import err, print_note
from armillary.spec.jobs import TrainJob

# Seconds between two lines where there is no terminal: a study of an hour leaves a page or two.
PAUSE = 30.0


class Bar:
    """Counts epochs over all runs, with the newest numbers beside them."""

    def __init__(self, shown: Progress, title: str, epochs: int) -> None:
        self._shown, self._seen = shown, dict[str, int]()
        self._title, self._total = title, max(epochs, 1)
        self._task = shown.add_task(title, total=self._total, note="")
        self._start = self._told = time.monotonic()

    def report(self, run_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Takes a run's report; fits ``on_report`` everywhere."""
        self._seen[run_id] = max(epoch, self._seen.get(run_id, 0))
        names = ("train/loss", "value", "verification/auc")
        note = "  ".join(f"{name.split('/')[-1]} {metrics[name]:.3f}" for name in names if name in metrics)
        self._shown.update(self._task, completed=sum(self._seen.values()), note=note)
        now = time.monotonic()
        if self._shown.disable and now - self._told >= PAUSE:
            self._told = now
            done = f"{sum(self._seen.values())} of {self._total} epochs in {now - self._start:.0f} s"
            print_note(f"{self._title}: {done}" + f"  {note}" * bool(note))


@contextmanager
def progress(title: str, jobs: Sequence[TrainJob]) -> Iterator[Bar]:
    """A bar over the epochs of the given jobs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        yield Bar(shown, title, sum(job.train.epochs for job in jobs))
