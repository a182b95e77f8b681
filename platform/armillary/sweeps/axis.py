"""Studies along a number: which variants make a line, and what their runs measured at each place."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import commonprefix

from armillary.spec.errors import UserError
from armillary.spec.jobs import StudyJob, StudyVariant, TrainJob
from armillary.spec.loading import apply_overrides
from armillary.training.rundir import RunRecord


@dataclass
class Line:
    """Variants that differ in the axis alone: their common name, and the runs' values at each place, ascending."""

    name: str
    values: dict[float, list[float]] = field(default_factory=dict)

    def sentence(self, axis: str, metric: str) -> str:
        """What the metric does from the first place to the last."""
        means = {place: sum(found) / len(found) for place, found in self.values.items()}
        first, last = min(means), max(means)
        if first == last:
            return f"{self.name}: {metric} {means[first]:.4f} at {axis} {first:g}."
        change = means[last] - means[first]
        ends = f"{means[first]:.4f} at {axis} {first:g}, {means[last]:.4f} at {last:g}"
        return f"{self.name}: {metric} {ends} ({change:+.4f})."


def place_of(job: StudyJob, variant: StudyVariant) -> float:
    """Where a variant stands on the study's axis.

    Raises:
        UserError: the axis is no key of a train job, or not a number there.
    """
    assert job.axis is not None
    found: object = apply_overrides(job.base, variant.set)
    assert isinstance(found, TrainJob)
    for part in job.axis.split("."):
        options = getattr(found, "options", {})
        found = options[part] if part in options else getattr(found, part, None)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UserError(
            f"{job.axis!r} is {found!r} in variant {variant.name!r}",
            key="axis",
            allowed="a key of a train job with a number in every variant, e.g. data.label_noise",
        )
    return float(found)


def lines(job: StudyJob, records: Sequence[RunRecord], metric: str) -> list[Line]:
    """The lines of a study's plot, in the order of its variants; runs without the metric are left out."""
    grouped: dict[str, list[StudyVariant]] = defaultdict(list)
    for variant in job.variants:
        rest = {key: value for key, value in variant.set.items() if key != job.axis}
        grouped[json.dumps(rest, sort_keys=True, default=str)].append(variant)
    found = []
    for variants in grouped.values():
        names = [variant.name for variant in variants]
        # Letter by letter: "softmax 32" and "softmax 64" are one line, and of "alpha 0.1" and "alpha 0.3" it is alpha.
        common = commonprefix(names).rstrip(" .-0123456789") if len(names) > 1 else names[0]  # noqa: RUF071
        line = Line(common or job.name)
        for place, name in sorted((place_of(job, variant), variant.name) for variant in variants):
            values = [r.metrics[metric] for r in records if r.variant == name and metric in r.metrics]
            if values:
                line.values.setdefault(place, []).extend(values)
        if line.values:
            found.append(line)
    return found
