"""Progress bars for one run or many; silent when standard error is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from armillary.cli.console import err
from armillary.spec.jobs import TrainJob


class Bar:
    """One bar that counts epochs over all runs, with the newest numbers beside it."""

    def __init__(self, shown: Progress, title: str, epochs: int) -> None:
        self._shown, self._seen = shown, dict[str, int]()
        self._task = shown.add_task(title, total=max(epochs, 1), note="")

    def report(self, run_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Takes a run's report; fits ``on_report`` everywhere."""
        self._seen[run_id] = max(epoch, self._seen.get(run_id, 0))
        names = ("train/loss", "value", "verification/auc")
        note = "  ".join(f"{name.split('/')[-1]} {metrics[name]:.3f}" for name in names if name in metrics)
        self._shown.update(self._task, completed=sum(self._seen.values()), note=note)


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
