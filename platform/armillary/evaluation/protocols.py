"""The registry of evaluation protocols, and the one function that runs any of them.

Every protocol compares embeddings by cosine similarity (a zero vector has similarity 0 with everything) and treats
scores that differ by less than about 1e-12 as equal; each one's docstring says what a tie then means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from armillary.evaluation.clustering import clustering
from armillary.evaluation.cross_retrieval import cross_retrieval
from armillary.evaluation.geometry import geometry
from armillary.evaluation.inputs import checked_columns, checked_pairs, checked_samples, checked_templates
from armillary.evaluation.neighbors import knn
from armillary.evaluation.probe import few_label, probe
from armillary.evaluation.quality import quality_verification
from armillary.evaluation.ranking import identification, retrieval
from armillary.evaluation.recommendation import recommendation
from armillary.evaluation.result import EvaluationSet, Interactions, Pairs, ProtocolResult, Templates
from armillary.evaluation.templates import templates as judge_templates
from armillary.evaluation.verification import verification
from armillary.spec.errors import UserError, unknown_name

__all__ = ["Protocol", "ProtocolResult", "Requirements", "evaluate", "get", "names", "requirements"]


@dataclass(frozen=True)
class Requirements:
    """What a protocol asks of the data.

    Args:
        needs_train: training embeddings and labels must be given.
        closed_set: ``True``: evaluated classes must be training classes; ``False``: they must not be; ``None``: either.
    """

    needs_train: bool
    closed_set: bool | None


@dataclass(frozen=True)
class Protocol:
    """A way to judge embeddings: its name, what it asks for, and the function that computes it."""

    name: str
    requirements: Requirements
    run: Callable[[EvaluationSet], ProtocolResult]

    @property
    def summary(self) -> str:
        """The first line of its definition."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


_EITHER, _CLOSED, _OPEN = Requirements(False, None), Requirements(True, True), Requirements(False, False)
_FITTED = Requirements(True, None)
_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("verification", _EITHER, verification),
        Protocol("identification", _EITHER, identification),
        Protocol("retrieval", _EITHER, retrieval),
        Protocol("knn", _CLOSED, knn),
        Protocol("probe", _CLOSED, probe),
        Protocol("few_label", _CLOSED, few_label),
        Protocol("clustering", _OPEN, clustering),
        Protocol("geometry", _EITHER, geometry),
        Protocol("quality_verification", _FITTED, quality_verification),
        Protocol("cross_retrieval", _EITHER, cross_retrieval),
        Protocol("templates", _EITHER, judge_templates),
        Protocol("recommendation", _CLOSED, recommendation),
    )
}


def names() -> list[str]:
    """All protocols, sorted."""
    return sorted(_PROTOCOLS)


def get(name: str, **context: str | None) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: there is none; shows the nearest. ``context`` (``where``, ``key``) goes into the message.
    """
    if name not in _PROTOCOLS:
        raise unknown_name("protocol", name, names(), **context)
    return _PROTOCOLS[name]


def requirements(name: str) -> Requirements:
    """What the named protocol asks of the data."""
    return get(name).requirements


def evaluate(
    name: str,
    embeddings: Any,
    labels: Any,
    *,
    train_embeddings: Any = None,
    train_labels: Any = None,
    columns: Mapping[str, Any] | None = None,
    pairs: Pairs | None = None,
    templates: Templates | None = None,
    interactions: Interactions | None = None,
    seed: int = 0,
) -> ProtocolResult:
    """Judges embeddings by the named protocol.

    Args:
        name: one of :func:`names`.
        embeddings: ``(n, d)`` numbers (array or CPU tensor), n >= 2; cast to float64 and never changed.
        labels: ``(n,)`` integers or strings.
        train_embeddings: ``(m, d)`` of the training part, for protocols with ``needs_train``; ignored by the others.
        train_labels: ``(m,)``, in the same naming as ``labels``.
        columns: ``(n,)`` each; ``quality`` is read by geometry, the others are carried.
        pairs: positions of samples that verification compares instead of all pairs.
        templates: for the protocol ``templates``; positions of samples.
        interactions: for the protocol ``recommendation``.
        seed: fixes what a protocol draws; results are a function of the input and the seed.

    Raises:
        UserError: unknown protocol, malformed input, or input the protocol cannot judge.
    """
    protocol = get(name)
    points, classes = checked_samples("embeddings", embeddings, "labels", labels)
    if len(points) < 2:
        raise UserError(f"there must be two embeddings or more, found {len(points)}", key="embeddings")
    extras: dict[str, Any] = {
        "columns": checked_columns(columns, len(points)),
        "pairs": checked_pairs(pairs, len(points)),
        "templates": checked_templates(templates, len(points)),
        "interactions": interactions,
        "seed": seed,
    }
    if not protocol.requirements.needs_train or train_embeddings is None or train_labels is None:
        return protocol.run(EvaluationSet(points, _encode(classes), **extras))
    train, train_classes = checked_samples("train_embeddings", train_embeddings, "train_labels", train_labels)
    if train.shape[1] != points.shape[1]:
        raise UserError(
            f"training embeddings are {train.shape[1]} wide, evaluated ones {points.shape[1]}", key="train_embeddings"
        )
    if train_classes.dtype.kind != classes.dtype.kind and "U" in (train_classes.dtype.kind, classes.dtype.kind):
        raise UserError(
            "training labels and evaluated labels must both be integers or both strings", key="train_labels"
        )
    joint = _encode(np.concatenate((classes, train_classes)))
    return protocol.run(EvaluationSet(points, joint[: len(points)], train, joint[len(points) :], **extras))


def _encode(labels: Any) -> Any:
    """Classes counted from 0 in sorted order."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
