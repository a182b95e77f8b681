"""Templates: sets of images compared as one, in the manner of IJB-B and IJB-C."""

from __future__ import annotations

import dataclasses

import numpy as np

from armillary.evaluation.open_set import best_matches, detection_rates
from armillary.evaluation.result import EvaluationSet, Floats, Ints, Pairs, ProtocolResult, Templates
from armillary.evaluation.roc import roc_curve
from armillary.evaluation.similarity import normalize
from armillary.evaluation.verification import AllPairs, check_kinds, curves_of, metrics_of, pair_scores, roc_of
from armillary.spec.errors import UserError


def pool_templates(embeddings: Floats, templates: Templates) -> tuple[Ints, Floats]:
    """One feature a template: raw embeddings averaged within each media, and media averaged, then normalised.

    The embeddings are not normalised before, so that within a media an image counts by its norm, which grows with
    quality; and a media counts once however many frames it has.

    Args:
        embeddings: ``(n, d)`` raw.
        templates: which rows, in which template and media.

    Returns:
        ``(t,)`` the templates' names, ascending, and ``(t, d)`` their features, of norm 1 (0 where all cancels out).
    """
    names, template = np.unique(templates.template, return_inverse=True)
    # Media are numbered anew within each template: one photograph may serve several templates.
    keys = np.stack((template, templates.media), axis=1)
    media_keys, media = np.unique(keys, axis=0, return_inverse=True)
    media = media.reshape(-1)
    media_mean = _group_mean(embeddings, templates.row, media, len(media_keys))
    return names, normalize(_group_mean(media_mean, np.arange(len(media_keys)), media_keys[:, 0], len(names)))


def _group_mean(values: Floats, rows: Ints, group: Ints, groups: int) -> Floats:
    """Means of ``values[rows]`` by group, ``(groups, d)``; every group must occur."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(groups))
    sums = np.add.reduceat(values[rows[order]], starts, axis=0)
    return np.asarray(sums / np.bincount(group, minlength=groups)[:, None])


def template_values(values: Ints, templates: Templates, names: Ints, what: str) -> Ints:
    """The one value that all members of each template share, ``(t,)``.

    Raises:
        UserError: members of a template differ.
    """
    template = np.searchsorted(names, templates.template)
    order = np.argsort(template, kind="stable")
    starts = np.searchsorted(template[order], np.arange(len(names)))
    lowest, highest = np.minimum.reduceat(values[order], starts), np.maximum.reduceat(values[order], starts)
    mixed = np.flatnonzero(lowest != highest)
    if len(mixed):
        raise UserError(
            f"{len(mixed)} of {len(names)} templates hold more than one {what}, the first is {names[mixed[0]]}",
            key="templates",
        )
    return np.asarray(lowest)


def templates(data: EvaluationSet, *, elements: int | None = None, capacity: int | None = None) -> ProtocolResult:
    """Verification of templates, and their identification where galleries are given.

    Features are those of :func:`pool_templates`; scores are cosines.

    ``auc``, ``eer``
        As for verification, over the given matches, or over all pairs of templates when there are none.
    ``tpr_at_fpr_1e-k``
        True positive rate at the lowest threshold whose false positive rate does not exceed 10**-k, k = 1 ... 6,
        without interpolation. Left out where fewer than 10**k impostor matches exist.
    ``rank1``, ``rank5``
        With galleries: the share of probe templates whose class is enrolled that find it first, or among the first
        five entries; entries of other classes go first in ties. The mean over galleries.
    ``tpir_at_fpir_1e-1``, ``tpir_at_fpir_1e-2``
        With galleries: the share of those probes that find it first with a score at or above the lowest threshold that
        no more than that share of the probes of other classes reaches. Left out for all galleries where one has too few
        such probes.

    Curves: ``roc_far``, ``roc_tar``, ``roc_threshold``.

    Sources: Maze et al., IARPA Janus Benchmark - C, ICB 2018; Whitelam et al., IARPA Janus Benchmark-B, CVPRW 2017.

    Raises:
        UserError: no templates, templates of several classes, matches of templates that do not exist or of one kind
            only, or a gallery that no probe can be found in.
    """
    if data.templates is None:
        raise UserError(
            "templates needs a table that puts images into templates",
            hint="give --templates FILE, or evaluate a dataset with a table 'templates'",
        )
    names, features = pool_templates(data.embeddings, data.templates)
    subject = template_values(data.labels[data.templates.row], data.templates, names, "class")
    if data.templates.matches is None:
        everything = AllPairs(features, subject, elements=elements)
        sizes = (everything.num_genuine, everything.num_impostor)
        if 0 in sizes:
            raise UserError(f"templates make {sizes[0]} genuine and {sizes[1]} impostor pairs; both kinds are needed")
        roc = roc_curve(everything.genuine, everything.impostor, *sizes, capacity=capacity)
    else:
        matches = _located(data.templates.matches, names)
        check_kinds(matches, "templates")
        roc = roc_of(pair_scores(features, matches), matches.same)
    metrics = metrics_of(roc, "templates", "tpr_at_fpr")
    if data.templates.gallery is not None:
        gallery = template_values(data.templates.gallery, data.templates, names, "gallery")
        metrics |= {f"templates/{name}": value for name, value in _identify(features, subject, gallery).items()}
    return ProtocolResult(metrics, curves_of(roc))


def _located(matches: Pairs, names: Ints) -> Pairs:
    """Matches with positions instead of names."""
    found = []
    for side in (matches.first, matches.second):
        at = np.minimum(np.searchsorted(names, side), len(names) - 1)
        missing = np.flatnonzero(names[at] != side)
        if len(missing):
            raise UserError(
                f"{len(missing)} matches name templates that do not exist, the first is {side[missing[0]]}",
                key="matches",
            )
        found.append(at)
    return dataclasses.replace(matches, first=found[0], second=found[1])


def _identify(features: Floats, subject: Ints, gallery: Ints) -> dict[str, float]:
    probes = gallery < 0
    results: list[dict[str, float]] = []
    for index in np.unique(gallery[~probes]):
        here = gallery == index
        rank, best = best_matches(features[probes], subject[probes], features[here], subject[here])
        mated = rank[rank > 0]
        if not len(mated):
            raise UserError(f"no probe template is of a class enrolled in gallery {index}", key="templates")
        result = {f"rank{k}": float((mated <= k).mean()) for k in (1, 5)}
        strangers = len(rank) - len(mated)
        rates = detection_rates(rank, best)[1]
        for power in (1, 2):
            if strangers >= 10**power:
                result[f"tpir_at_fpir_1e-{power}"] = float(rates[strangers // 10**power])
        results.append(result)
    if not results:
        raise UserError("no template is in a gallery", key="templates", hint="leave the column 'gallery' out")
    shared = [name for name in results[0] if all(name in result for result in results)]
    return {name: float(np.mean([result[name] for result in results])) for name in shared}
