"""Whether a run's batches had anything to learn from: pairs, triplets or anchors that cost something.

Losses over pairs and tuples log ``empty``, 1 for a batch in which none is active; an epoch's mean is the share of such
batches. A run in which they are the most learns from few of its steps, and its loss looks splendid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from armillary.spec.jobs import TrainJob

EMPTY, ACTIVE = "train/empty", "train/active_share"
# A larger share of a run's batches, or of one epoch's, is told.
_MOST = 0.5


def is_scarce(metrics: Mapping[str, float]) -> bool:
    """Whether most batches of an epoch with these metrics were empty."""
    return metrics.get(EMPTY, 0.0) > _MOST


def mostly_empty(job: TrainJob, options: Any, events: Iterable[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The first epoch with mostly empty batches, and a sentence that says so and what to do; ``None`` without one.

    Args:
        job: whose objective it is.
        options: the objective's hyperparameters; what is advised depends on what it has.
        events: epochs in order: ``step`` counts them from 1, ``metrics`` are theirs.
    """
    seen = {event["step"]: event["metrics"] for event in events if EMPTY in event["metrics"]}
    first = next((epoch for epoch, metrics in seen.items() if is_scarce(metrics)), None)
    if first is None:
        return None
    share = seen[first].get(ACTIVE)
    of_all = "" if share is None else f" ({100 * share:.2g}% of all its tuples were active)"
    advice = ["a larger train.batch_size"]
    if hasattr(options, "samples_per_class"):
        advice.append(f"another objective.samples_per_class than {options.samples_per_class}")
    if hasattr(options, "margin"):
        advice.append(f"a larger objective.margin than {options.margin:g}")
    if hasattr(options, "mining"):
        advice.append(f"another objective.mining than {options.mining}")
    sentence = (
        f"{job.objective.name}: {100 * seen[first][EMPTY]:.0f}% of the batches of epoch {first} had nothing to learn "
        f"from{of_all}; try {' or '.join(advice)}"
    )
    late = "; or the classes are told apart by now, and nothing is left to learn" if first > 1 else ""
    return first, sentence + late
