"""Open-set identification: is the person enrolled at all, and who is it?"""

from __future__ import annotations

import numpy as np

from armillary.evaluation.result import Flags, Floats, Ints
from armillary.evaluation.similarity import block_rows, grid_scores, normalize

DRAWS = 5
# Above this many images one draw is steady enough, and five of them would cost more than the closed set.
_ONE_DRAW = 10_000


def best_matches(probes: Floats, probe_labels: Ints, gallery: Floats, gallery_labels: Ints) -> tuple[Ints, Floats]:
    """Where each probe's class is ranked in a gallery, and the score of its best candidate.

    Args:
        probes: ``(p, d)`` normalised.
        probe_labels: ``(p,)`` their classes.
        gallery: ``(g, d)`` normalised, g >= 1.
        gallery_labels: ``(g,)``; a class may have several entries, of which the best counts.

    Returns:
        ``(p,)`` the rank from 1 of the best entry of the probe's class, an entry of another class that scores the same
        going first, and 0 where the gallery lacks the class; ``(p,)`` the highest score in grid units.
    """
    rank, best = np.zeros(len(probes), dtype=np.int64), np.empty(len(probes))
    step = block_rows(len(gallery))
    for start in range(0, len(probes), step):
        part = slice(start, start + step)
        scores = grid_scores(probes[part], gallery)
        mate = gallery_labels == probe_labels[part, None]
        own = np.where(mate, scores, -np.inf).max(axis=1)
        before = np.count_nonzero((scores >= own[:, None]) & ~mate, axis=1)
        rank[part] = np.where(np.isfinite(own), before + 1, 0)
        best[part] = scores.max(axis=1)
    return rank, best


def detection_rates(rank: Ints, best: Floats) -> tuple[Ints, Floats]:
    """Detection and identification rates at rank 1, at every number of false alarms.

    A probe of an enrolled class is detected and identified when its class is ranked first with a score at or above the
    threshold; a probe of a class that is not enrolled raises a false alarm when any entry scores at or above it.

    Args:
        rank: ``(p,)`` from :func:`best_matches`; 0 marks probes that are not enrolled. Both kinds must occur.
        best: ``(p,)`` the scores of their best candidates.

    Returns:
        False alarms that are allowed, ascending from 0, ``(u + 1,)`` for u probes that are not enrolled; the best rate
        that a threshold with no more of them reaches.
    """
    alarms = np.sort(best[rank == 0])[::-1]
    identified = np.sort(best[rank == 1])
    # With k allowed, the threshold lies just above the (k+1)-th highest alarm; with all allowed, below everything.
    bound = np.append(alarms, -np.inf)
    hits = len(identified) - np.searchsorted(identified, bound, side="right")
    return np.arange(len(bound)), hits / np.count_nonzero(rank)


def enrolment(labels: Ints, seed: int) -> tuple[Ints, Flags] | None:
    """Who is enrolled, with which image, and which images are probes of them.

    Half of the classes with two images or more, rounded down and at least one, are drawn to be enrolled, each with one
    drawn image. All other images are probes: mated ones of the enrolled classes, non-mated ones of all the rest.

    Returns:
        ``(g,)`` positions of the gallery and ``(n,)`` whether an image is a probe; ``None`` when there are not two
        classes, one of them with two images.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels)
    several = np.flatnonzero(counts >= 2)
    if not len(several) or np.count_nonzero(counts) < 2:
        return None
    enrolled = rng.permutation(several)[: max(1, len(several) // 2)]
    shuffled = rng.permutation(len(labels))
    shuffled = shuffled[np.isin(labels[shuffled], enrolled)]
    gallery = shuffled[np.unique(labels[shuffled], return_index=True)[1]]
    probe = np.ones(len(labels), dtype=np.bool_)
    probe[gallery] = False
    return gallery.astype(np.int64), probe


def open_set(embeddings: Floats, labels: Ints, seed: int) -> tuple[dict[str, float], dict[str, Floats]]:
    """Detection and identification rates (DIR) of a labelled set, the mean over five enrolments drawn by ``seed``.

    Each enrolment is one of :func:`enrolment`, its rates those of :func:`detection_rates`; ``dir_at_far_1e-k`` is read
    off at the largest number of false alarms that is not above 10**-k of the non-mated probes, without interpolation,
    for k = 1, 2, 3, and left out where an enrolment has fewer than 10**k non-mated probes. Above 10,000 images there is
    one enrolment only.

    Sources: Phillips, Grother, Micheals, Evaluation methods in face recognition, 2005 (DIR at FAR); Liao et al., A
    Benchmark Study of Large-Scale Unconstrained Face Recognition (BLUFR), IJCB 2014 (gallery of one image a person,
    several draws). NIST's FRVT 1:N calls the two rates TPIR and FPIR.

    Returns:
        The metrics, without a prefix, and the curve of the mean ``dir_rate`` over ``dir_far`` from 1e-3 to 1; both
        empty when nobody can be enrolled.
    """
    points = normalize(embeddings)
    grid = np.concatenate((np.geomspace(1e-3, 1.0, 61), [0.1, 0.01, 0.001]))
    draws, resolved = [], np.inf
    for draw in range(DRAWS if len(labels) <= _ONE_DRAW else 1):
        chosen = enrolment(labels, int(np.random.default_rng((seed, draw)).integers(2**62)))
        if chosen is None:
            return {}, {}
        gallery, probe = chosen
        rank, best = best_matches(points[probe], labels[probe], points[gallery], labels[gallery])
        _, rates = detection_rates(rank, best)
        strangers = len(rates) - 1
        resolved = min(resolved, strangers)
        # A hair more keeps 10 * 0.1 at one false alarm.
        draws.append(rates[(grid * strangers * (1 + 1e-12)).astype(np.int64)])
    mean = np.mean(draws, axis=0)
    metrics = {f"dir_at_far_1e-{k}": float(mean[60 + k]) for k in (1, 2, 3) if resolved >= 10**k}
    return metrics, {"dir_far": grid[:61], "dir_rate": mean[:61]}
