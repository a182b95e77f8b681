"""What every protocol takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class ProtocolResult:
    """The outcome of one protocol.

    ``metrics`` maps ``<protocol>/<metric>`` to a finite number; ``curves`` maps short names (``roc_far``) to the arrays
    a figure is drawn from; ``warnings`` are sentences for the user, e.g. that the embeddings have collapsed.
    """

    metrics: dict[str, float]
    curves: dict[str, NDArray[Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """A given list of comparisons, such as LFW's pairs or IJB's matches.

    Args:
        first: ``(p,)`` int64, positions of samples, or names of templates.
        second: ``(p,)`` int64.
        same: ``(p,)`` whether both are of one class.
        fold: ``(p,)`` the fold of each comparison; ``None``: the list's order decides.
    """

    first: Ints
    second: Ints
    same: Flags
    fold: Ints | None = None


@dataclass(frozen=True)
class Templates:
    """Sets of images that are compared as one, in the manner of IJB-B and IJB-C.

    Args:
        row: ``(m,)`` int64, position of a sample; a sample may belong to several templates.
        template: ``(m,)`` int64, the template it belongs to, any number.
        media: ``(m,)`` int64, the photograph or video it was taken from; counted within its template.
        matches: which templates are compared; ``None``: all with all.
        gallery: ``(m,)`` int64, the gallery (0, 1, ...) that the template is enrolled in, negative for probes; one
            value a template. ``None``: there is no identification.
    """

    row: Ints
    template: Ints
    media: Ints
    matches: Pairs | None = None
    gallery: Ints | None = None


@dataclass(frozen=True)
class Interactions:
    """Users, items, and who chose what.

    Args:
        user_embeddings: ``(users, d)`` float64.
        item_embeddings: ``(items, d)``.
        train: ``(2, m)`` int64, pairs of a user and an item that were trained on.
        held_out: ``(2, h)`` int64, pairs that are looked for.
    """

    user_embeddings: Floats
    item_embeddings: Floats
    train: Ints
    held_out: Ints


@dataclass(frozen=True)
class EvaluationSet:
    """Checked input of a protocol.

    Args:
        embeddings: ``(n, d)`` float64 as the encoder gave them, finite, not normalised.
        labels: ``(n,)`` int64; classes are counted from 0 over the evaluated and the training samples together.
        train_embeddings: ``(m, d)`` float64, for protocols that need training samples.
        train_labels: ``(m,)`` int64.
        seed: fixes whatever a protocol draws.
        columns: more about each sample, ``(n,)`` each, e.g. ``quality``.
        pairs: the comparisons that verification makes; ``None``: all pairs.
        templates: for the protocol of that name.
        interactions: for the protocol ``recommendation``.
    """

    embeddings: Floats
    labels: Ints
    train_embeddings: Floats | None = None
    train_labels: Ints | None = None
    seed: int = 0
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    pairs: Pairs | None = None
    templates: Templates | None = None
    interactions: Interactions | None = None
