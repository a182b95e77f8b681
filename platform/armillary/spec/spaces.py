"""Search spaces: the range of each hyperparameter, by dotted job key.

::

    objective.margin: {low: 0.1, high: 0.7}
    optimizer.lr: {low: 0.0003, high: 0.01, log: true}
    objective.mode: {choices: [out, in]}
    objective.projection_dim: {low: 64, high: 512, int: true}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from armillary.spec import document as yaml_document
from armillary.spec.document import Document, KeyPath
from armillary.spec.environment import FromEnvironment
from armillary.spec.errors import UserError
from armillary.spec.files import find
from armillary.spec.invalid import explain, show
from armillary.spec.jobs import Scalar, TrainJob
from armillary.spec.overrides import apply_overrides
from armillary.spec.section import Section


class Range(Section):
    """Values a hyperparameter may take: from ``low`` to ``high``, both included, or one of ``choices``.

    ``log`` draws evenly in the logarithm and needs ``low > 0``; ``integer`` (``int`` in files) draws whole numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = Field(False, alias="int")
    choices: tuple[Scalar, ...] | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.choices is not None:
            if not self.choices or len(set(self.choices)) < len(self.choices):
                raise ValueError(f"choices is {list(self.choices)}; give at least one value, each once")
            if self.low is not None or self.high is not None or self.log or self.integer:
                raise ValueError("give choices alone, or low and high")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; with log it must be above 0")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; with int both must be whole")
        return self

    def ends(self) -> tuple[Scalar, ...]:
        """The values whose legality decides that of all others: both ends, or every choice."""
        if self.choices is not None:
            return self.choices
        ends = (self.low or 0.0, self.high or 0.0)
        return tuple(int(end) for end in ends) if self.integer else ends


def load_space(space: str | Path | Mapping[str, Any]) -> dict[str, Range]:
    """The ranges of a search space by dotted key, in the order written.

    Args:
        space: a name in ``search_spaces/``, the path of a YAML file, or the ranges themselves.

    Raises:
        UserError: no such file, a key no job has, or a range that is malformed or leaves what the key allows.
    """
    if isinstance(space, Mapping):
        return check_space(dict(space), lambda _: "space", ())
    document = read_space(space)
    return check_space(document.values, document.place, ())


def read_space(space: str | Path, near: Path | None = None, *, where: str | None = None) -> Document:
    """The file of a search space, not yet checked; ``near`` is the folder of the job that names it."""
    label = space.reference if isinstance(space, FromEnvironment) else None
    path = find("search_spaces", space, near, where=where, key="space" if where else None)
    document = yaml_document.read(path, label)
    document.resolve_environment()
    return document


def check_space(values: Any, place: Callable[[KeyPath], str | None], prefix: KeyPath) -> dict[str, Range]:
    """Checks plain values as a search space; ``prefix`` are the keys that lead to them in their document."""
    if not isinstance(values, dict) or not values:
        raise UserError(
            f"found {show(values)}",
            where=place(prefix),
            key=".".join(map(str, prefix)) or None,
            allowed="ranges by dotted key, e.g. objective.margin: {low: 0.1, high: 0.7}",
        )
    return {key: _check_range(key, value, place, (*prefix, key)) for key, value in values.items()}


def _check_range(key: str, value: Any, place: Callable[[KeyPath], str | None], path: KeyPath) -> Range:
    where = place(path)
    if not isinstance(value, dict):
        raise UserError(
            f"found {show(value)}",
            where=where,
            key=key,
            allowed="{low: .., high: ..} with log: true or int: true where wanted, or {choices: [..]}",
        )
    if key in ("kind", "name"):
        raise UserError("this key cannot be searched", where=where, key=key, allowed="hyperparameters of a train job")
    try:
        checked = Range.model_validate(value)
    except ValidationError as error:
        raise explain(error, Range, lambda inner: place((*path, *inner[1:])), (key,)) from None
    # Any objective will do: its own hyperparameters are checked by the objective, everything else here.
    job = TrainJob.model_validate({"objective": {"name": "any"}})
    for end in checked.ends():
        apply_overrides(job, {key: end}, where=where)
    return checked
