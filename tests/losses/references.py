"""Slow references: each loss over Python floats, one sample at a time, straight from its equation."""

from __future__ import annotations

from math import acos, cos, exp, log, pi, sin, sqrt

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    length = sqrt(dot(a, a))
    return [x / length for x in a]


def cosine(a: Vector, b: Vector) -> float:
    return max(-1.0, min(1.0, dot(unit(a), unit(b))))


def cross_entropy(logits: Vector, label: int) -> float:
    return -log(exp(logits[label]) / sum(exp(z) for z in logits))


def softmax(embedding: Vector, weight: list[Vector], label: int, bias: Vector | None = None) -> float:
    return cross_entropy([dot(w, embedding) + (bias[j] if bias else 0) for j, w in enumerate(weight)], label)


def normface(embedding: Vector, weight: list[Vector], label: int, scale: float) -> float:
    return cross_entropy([scale * cosine(w, embedding) for w in weight], label)


def cosface(embedding: Vector, weight: list[Vector], label: int, margin: float, scale: float) -> float:
    cosines = [cosine(w, embedding) for w in weight]
    cosines[label] -= margin
    return cross_entropy([scale * c for c in cosines], label)


def arcface_target(theta: float, margin: float, easy_margin: bool, extension: bool) -> float:
    if easy_margin:
        return cos(theta + margin) if theta < pi / 2 else cos(theta)
    if extension and theta >= pi - margin:
        return cos(theta) - margin * sin(margin)
    return cos(theta + margin)


def arcface(
    embedding: Vector,
    weight: list[Vector],
    label: int,
    margin: float,
    scale: float,
    easy_margin: bool = False,
    extension: bool = True,
) -> float:
    cosines = [cosine(w, embedding) for w in weight]
    cosines[label] = arcface_target(acos(cosines[label]), margin, easy_margin, extension)
    return cross_entropy([scale * c for c in cosines], label)


def supcon(embeddings: list[Vector], labels: list[int], temperature: float, mode: str) -> list[float | None]:
    """One value an anchor; None without a positive."""
    values: list[float | None] = []
    for i, anchor in enumerate(embeddings):
        others = [a for a in range(len(embeddings)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        total = sum(exp(cosine(anchor, embeddings[a]) / temperature) for a in others)
        shares = [exp(cosine(anchor, embeddings[p]) / temperature) / total for p in positives]
        if not positives:
            values.append(None)
        elif mode == "out":
            values.append(-sum(log(share) for share in shares) / len(positives))
        else:
            values.append(-log(sum(shares) / len(positives)))
    return values


def nt_xent(view1: list[Vector], view2: list[Vector], temperature: float) -> Vector:
    both, count = view1 + view2, len(view1)
    values = []
    for i, anchor in enumerate(both):
        total = sum(exp(cosine(anchor, both[k]) / temperature) for k in range(2 * count) if k != i)
        values.append(-log(exp(cosine(anchor, both[(i + count) % (2 * count)]) / temperature) / total))
    return values


def triplets(labels: list[int], distance: list[Vector], mining: str) -> list[tuple[int, int, int]]:
    """The chosen (anchor, positive, negative)."""
    chosen = []
    for a, row in enumerate(distance):
        positives = [p for p in range(len(labels)) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(len(labels)) if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "batch_hard":
            chosen.append((a, max(positives, key=row.__getitem__), min(negatives, key=row.__getitem__)))
            continue
        for p in positives:
            farther = [n for n in negatives if row[n] > row[p]]
            if mining == "all":
                chosen += [(a, p, n) for n in negatives]
            elif mining == "hard_negative":
                chosen.append((a, p, min(negatives, key=row.__getitem__)))
            elif farther:
                chosen.append((a, p, min(farther, key=row.__getitem__)))
            else:
                chosen.append((a, p, max(negatives, key=row.__getitem__)))
    return chosen


def triplet(
    embeddings: list[Vector],
    labels: list[int],
    margin: float,
    mining: str,
    squared: bool,
    soft: bool,
    reduction: str,
) -> float | Vector:
    """The reduced loss, or each anchor's sum for ``none``."""
    units = [unit(vector) for vector in embeddings]
    power = 2 if squared else 1
    distance = [[sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) ** power for b in units] for a in units]
    losses = []
    for a, p, n in triplets(labels, distance, mining):
        difference = distance[a][p] - distance[a][n]
        losses.append((a, log(1 + exp(difference)) if soft else max(0.0, difference + margin)))
    if reduction == "none":
        return [sum(loss for anchor, loss in losses if anchor == a) for a in range(len(labels))]
    total, active = sum(loss for _, loss in losses), sum(loss > 0 for _, loss in losses)
    return total / {"sum": 1, "mean_all": max(1, len(losses)), "mean_active": max(1, active)}[reduction]
