"""The margin family against its equations: every sample by itself, all logits at once, gradients by autograd.

Nothing of the pipeline is used: no chunks, no target rules. Inputs are random, with a sample on its class' row and one
opposite to it, and long and short ones, so that every branch is met.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary import losses

SIZE, DIM, CLASSES = 10, 6, 5
S = 9.0


def inputs(seed: int, *row_shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, rows and labels; with sub-centers rows are ``(classes, K, dim)``."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = 2 * torch.randn(SIZE, DIM, generator=draw, dtype=torch.float64)
    weight = torch.randn(CLASSES, *row_shape, DIM, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SIZE,), generator=draw)
    first = weight.view(CLASSES, -1, DIM)[:, 0]
    embeddings[0] = -2 * first[labels[0]] + 0.05 * embeddings[0]
    embeddings[1] = 3 * first[labels[1]] + 0.05 * embeddings[1]
    embeddings[2] *= 0.2
    return embeddings, weight, labels


def cosines(x: Tensor, weight: Tensor) -> Tensor:
    """Of one sample, ``(classes,)``."""
    return torch.stack([(row @ x) / row.norm() / x.norm() for row in weight])


def entropy(logits: Tensor, label: int) -> Tensor:
    return -torch.log_softmax(logits, dim=0)[label]


def with_target(logits: Tensor, label: int, target: Tensor) -> Tensor:
    return torch.stack([target if j == label else value for j, value in enumerate(logits)])


def arc(cosine: Tensor, margin: float | Tensor, extension: bool = True, easy: bool = False) -> Tensor:
    theta, limit = cosine.acos(), float(torch.as_tensor(margin).detach())
    if easy:
        return torch.cos(theta + margin) if cosine > 0 else cosine
    if extension and float(theta.detach()) >= math.pi - limit:
        return cosine - margin * math.sin(limit)
    return torch.cos(theta + margin)


def psi(theta: Tensor, m: float) -> Tensor:
    k = min(int(float(theta.detach()) * m / math.pi), math.ceil(m) - 1)
    multiple = torch.cos(m * theta)
    return (-multiple if k % 2 else multiple) - 2 * k


def sphere(x: Tensor, weight: Tensor, label: int, m: float, ease: float, scale: float | None = None) -> Tensor:
    cosine = cosines(x, weight)
    target = (ease * cosine[label] + psi(cosine[label].acos(), m)) / (1 + ease)
    return entropy((x.norm() if scale is None else scale) * with_target(cosine, label, target), label)


def large_margin(x: Tensor, weight: Tensor, label: int, m: float, ease: float) -> Tensor:
    logits, cosine = weight @ x, cosines(x, weight)[label]
    target = weight[label].norm() * x.norm() * (ease * cosine + psi(cosine.acos(), m)) / (1 + ease)
    return entropy(with_target(logits, label, target), label)


def mv(x: Tensor, weight: Tensor, label: int, base: str, mode: str, easy: bool) -> Tensor:
    m, t, cosine = 0.35, 0.2, cosines(x, weight)
    margined = cosine[label] - m if base == "am" else torch.cos(cosine[label].acos() + m)
    target = cosine[label] if easy and cosine[label] <= 0 else margined
    total = (S * target).exp()
    for k, value in enumerate(cosine):
        if k != label:
            hard = float(margined < value)
            exponent = S * t * (value + 1) * hard if mode == "adaptive" else value * 0 + S * t * hard
            total = total + exponent.exp() * (S * value).exp()
    return total.log() - S * target


def magface(x: Tensor, weight: Tensor, label: int) -> Tensor:
    a, cosine = x.norm().clamp(1, 4), cosines(x, weight)
    margin = 0.1 + 0.4 * (a - 1) / 3
    target = arc(cosine[label], margin, easy=True)
    length: Tensor = 2 * (1 / a + a / 16)
    return entropy(S * with_target(cosine, label, target), label) + length


def subcenter(x: Tensor, weight: Tensor, label: int) -> Tensor:
    cosine = torch.stack([cosines(x, centers).max() for centers in weight])
    return entropy(S * with_target(cosine, label, arc(cosine[label], 0.4)), label)


def p2sgrad(x: Tensor, weight: Tensor, label: int) -> Tensor:
    return torch.stack([(value - float(j == label)) ** 2 for j, value in enumerate(cosines(x, weight))]).sum() / 2


def l2_softmax(x: Tensor, weight: Tensor, label: int) -> Tensor:
    return entropy(weight @ (5.0 * x / x.norm()), label)


def probability(x: Tensor, weight: Tensor, label: int) -> Tensor:
    cosine = cosines(x, weight)
    margin = 0.5 * math.exp(-2 * float(torch.softmax(S * cosine.detach(), 0)[label]))
    return entropy(S * with_target(cosine, label, arc(cosine[label], margin)), label)


def combined(x: Tensor, weight: Tensor, label: int) -> Tensor:
    cosine = cosines(x, weight)
    return entropy(S * with_target(cosine, label, torch.cos(0.9 * cosine[label].acos() + 0.4) - 0.15), label)


Sample = Callable[[Tensor, Tensor, int], Tensor]
EASED: dict[str, Any] = {"annealing_start": 0.5, "annealing_speed": 0.0, "annealing_floor": 0.0}
SAMPLES: list[tuple[type[losses.ClassHeadLoss], dict[str, Any], Sample]] = [
    *((losses.LSoftmax, {"margin": m, **EASED}, lambda x, w, y, m=m: large_margin(x, w, y, m, 0.5)) for m in (2, 3, 4)),
    *((losses.SphereFace, {"margin": m, **EASED}, lambda x, w, y, m=m: sphere(x, w, y, m, 0.5)) for m in (2, 4, 1.7)),
    (
        losses.SphereFace,
        {"margin": 1.7, "normalized": True, "scale": S, **EASED},
        lambda x, w, y: sphere(x, w, y, 1.7, 0.5, S),
    ),
    *(
        (
            losses.MVSoftmax,
            {"scale": S, "base": base, "mode": mode, "easy_margin": easy},
            lambda x, w, y, options=(base, mode, easy): mv(x, w, y, *options),
        )
        for base in ("am", "arc")
        for mode in ("adaptive", "fixed")
        for easy in (False, True)
    ),
    (
        losses.MagFace,
        {"scale": S, "norm_low": 1, "norm_high": 4, "margin_low": 0.1, "margin_high": 0.5, "regularizer": 2.0},
        magface,
    ),
    (losses.CombinedMargin, {"multiplier": 0.9, "margin": 0.4, "offset": 0.15, "scale": S}, combined),
    (losses.P2SGrad, {}, p2sgrad),
    (losses.L2Softmax, {"radius": 5.0}, l2_softmax),
    (losses.ProbabilityArcFace, {"scale": S, "decay": 2.0}, probability),
    (losses.SubcenterArcFace, {"scale": S, "margin": 0.4, "subcenters": 3}, subcenter),
]


def check(loss: losses.ClassHeadLoss, weight: Tensor, embeddings: Tensor, reference: Tensor, found: Tensor) -> None:
    """Equal values, and equal gradients of embeddings and rows."""
    torch.testing.assert_close(found, reference)
    ours = torch.autograd.grad(found, (embeddings, loss.weight))
    for gradient, expected in zip(ours, torch.autograd.grad(reference, (embeddings, weight)), strict=True):
        torch.testing.assert_close(gradient, expected)


def prepared(
    cls: type[losses.ClassHeadLoss], options: dict[str, Any], seed: int
) -> tuple[losses.ClassHeadLoss, Tensor, Tensor, Tensor]:
    loss = cls(CLASSES, DIM, **options).double()
    embeddings, weight, labels = inputs(seed, *loss.weight.shape[1:-1])
    with torch.no_grad():
        loss.weight.copy_(weight)
    return loss, embeddings.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("cls", "options", "of_sample"), SAMPLES, ids=lambda value: getattr(value, "__name__", None))
def test_sample_by_sample(
    cls: type[losses.ClassHeadLoss], options: dict[str, Any], of_sample: Sample, seed: int
) -> None:
    loss, embeddings, weight, labels = prepared(cls, options, seed)
    values = [of_sample(x, weight, int(y)) for x, y in zip(embeddings, labels, strict=True)]
    check(loss, weight, embeddings, torch.stack(values).mean(), loss(embeddings, labels))


# Losses of a sample that depend on the batch or on something given with it.


def angular(x: Tensor, weight: Tensor, label: int, margin: float = 0.5) -> Tensor:
    cosine = cosines(x, weight)
    return entropy(S * with_target(cosine, label, arc(cosine[label], margin)), label)


def own(embeddings: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    return [cosines(x, weight)[y] for x, y in zip(embeddings, labels, strict=True)]


def curriculum(embeddings: Tensor, weight: Tensor, labels: Tensor, turned: list[float]) -> Tensor:
    t = 0.3 * float(torch.stack(own(embeddings, weight, labels)).detach().mean())
    values = []
    for x, y, more in zip(embeddings, labels.tolist(), turned, strict=True):
        cosine = cosines(x, weight)
        border = torch.cos(cosine[y].acos() + 0.5)
        hard = [value * (t * (1 + more) + value) if value > border else value for value in cosine]
        values.append(entropy(S * with_target(torch.stack(hard), y, arc(cosine[y], 0.5)), y))
    return torch.stack(values).mean()


def adacos(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scale = math.sqrt(2) * math.log(CLASSES - 1)
    table = [cosines(x, weight).tolist() for x in embeddings]
    mass = [
        sum(math.exp(scale * c) for j, c in enumerate(row) if j != y)
        for row, y in zip(table, labels.tolist(), strict=True)
    ]
    angles = sorted(math.acos(row[y]) for row, y in zip(table, labels.tolist(), strict=True))
    median = (angles[SIZE // 2 - 1] + angles[SIZE // 2]) / 2
    scale = math.log(sum(mass) / SIZE) / math.cos(min(math.pi / 4, median))
    pairs = zip(embeddings, labels.tolist(), strict=True)
    return torch.stack([entropy(scale * cosines(x, weight), y) for x, y in pairs]).mean()


def weighted(embeddings: Tensor, weight: Tensor, labels: Tensor, weights: list[float]) -> Tensor:
    triples = zip(embeddings, labels.tolist(), weights, strict=True)
    return torch.stack([w * angular(x, weight, y) for x, y, w in triples]).mean()


POSE = torch.linspace(-100, 80, SIZE * 2, dtype=torch.float64).view(SIZE, 2)
TURN = [max(abs(a), abs(b)) for a, b in POSE.tolist()]


@pytest.mark.parametrize("seed", [0, 1])
def test_hard_classes_by_curriculum(seed: int) -> None:
    loss, embeddings, weight, labels = prepared(losses.CurricularFace, {"scale": S, "momentum": 0.7}, seed)
    check(loss, weight, embeddings, curriculum(embeddings, weight, labels, [0.0] * SIZE), loss(embeddings, labels))
    loss, embeddings, weight, labels = prepared(losses.PoseCurriculum, {"scale": S, "momentum": 0.7}, seed)
    expected = curriculum(embeddings, weight, labels, [min(1, phi / 90) for phi in TURN])
    check(loss, weight, embeddings, expected, loss(embeddings, labels, pose=POSE))


@pytest.mark.parametrize("seed", [0, 1])
def test_scale_of_the_batch(seed: int) -> None:
    loss, embeddings, weight, labels = prepared(losses.AdaCos, {}, seed)
    # The scale is kept as a float32 buffer elsewhere; here the module is float64.
    check(loss, weight, embeddings, adacos(embeddings, weight, labels), loss(embeddings, labels))
    loss, embeddings, weight, labels = prepared(losses.AdaCos, {"mode": "survey"}, seed)
    near = torch.stack(own(embeddings, weight, labels)).detach()
    scale = math.log(CLASSES - 1) / float((near - near.mean()).square().mean())
    values = [entropy(scale * cosines(x, weight), y) for x, y in zip(embeddings, labels.tolist(), strict=True)]
    check(loss, weight, embeddings, torch.stack(values).mean(), loss(embeddings, labels))


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_of_samples(seed: int) -> None:
    options = {"scale": S, "pose_limit": 60.0}
    loss, embeddings, weight, labels = prepared(losses.PoseWeightedArcFace, options, seed)
    expected = weighted(embeddings, weight, labels, [1 / (1 + math.exp(-0.05 * (60 - phi))) for phi in TURN])
    check(loss, weight, embeddings, expected, loss(embeddings, labels, pose=POSE))
    near = [float(cosine.detach()) for cosine in own(embeddings, weight, labels)]
    loss, embeddings, weight, labels = prepared(losses.SigmoidWeightedArcFace, {"scale": S, "kappa": 2.0}, seed)
    expected = weighted(embeddings, weight, labels, [1 / (1 + math.exp(2 * cosine)) for cosine in near])
    check(loss, weight, embeddings, expected, loss(embeddings, labels))
    loss, embeddings, weight, labels = prepared(losses.CurricularFace, {"scale": S, "formulation": "survey"}, seed)
    mean = sum(near) / SIZE
    expected = weighted(embeddings, weight, labels, [(1 + cosine - mean) / 2 for cosine in near])
    check(loss, weight, embeddings, expected, loss(embeddings, labels))


@pytest.mark.parametrize("seed", [0, 1])
def test_margins_that_are_given(seed: int) -> None:
    quality = torch.linspace(0, 1, SIZE, dtype=torch.float64).square()
    loss, embeddings, weight, labels = prepared(losses.QualityArcFace, {"scale": S}, seed)
    margins = (0.5 + 0.2 * (quality - quality.mean())).tolist()
    triples = zip(embeddings, labels.tolist(), margins, strict=True)
    expected = torch.stack([angular(x, weight, y, m) for x, y, m in triples]).mean()
    check(loss, weight, embeddings, expected, loss(embeddings, labels, quality=quality))
    of_class = torch.linspace(0.1, 0.6, CLASSES, dtype=torch.float64)
    for form in ("cos", "arc"):
        loss, embeddings, weight, labels = prepared(losses.ClassMargins, {"scale": S, "form": form}, seed)
        assert isinstance(loss, losses.ClassMargins)
        loss.set_margins(of_class)
        values = []
        for x, y in zip(embeddings, labels.tolist(), strict=True):
            cosine, m = cosines(x, weight), float(of_class[y])
            target = cosine[y] - m if form == "cos" else arc(cosine[y], m)
            values.append(entropy(S * with_target(cosine, y, target), y))
        check(loss, weight, embeddings, torch.stack(values).mean(), loss(embeddings, labels))


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_verification_pair_by_pair(distance: str) -> None:
    embeddings, _, labels = inputs(2)
    embeddings.requires_grad_()
    term = losses.PairVerification(distance, margin=4.0, negative_fraction=0.3).double()
    kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for i in range(SIZE):
        for j in range(SIZE):
            if i == j:
                continue
            same, difference = bool(labels[i] == labels[j]), embeddings[i] - embeddings[j]
            if distance == "cosine":
                agreement = torch.sigmoid(embeddings[i] @ embeddings[j] / embeddings[i].norm() / embeddings[j].norm())
                kinds[same].append((float(same) - agreement) ** 2 / 2)
                continue
            d = difference.abs().sum() if distance == "l1" else difference.square().sum().sqrt()
            kinds[same].append((d if same else (4.0 - d).clamp_min(0)) ** 2 / 2)
    expected = 0.7 * torch.stack(kinds[True]).mean() + 0.3 * torch.stack(kinds[False]).mean()
    found = term(embeddings, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, embeddings)[0] for value in (found, expected)))


def test_centers_class_by_class() -> None:
    """Copies of one feature move their centre by alpha n / (1 + n); classes that are absent keep theirs."""
    term = losses.CenterLoss(CLASSES, DIM, alpha=0.4).double()
    embeddings, start, _ = inputs(3)
    term.centers.copy_(start)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    embeddings[5:] = embeddings[5]
    term(embeddings, labels)
    term.update()
    for label in range(CLASSES):
        mine = embeddings[labels == label]
        moved = start[label] - 0.4 * (start[label] - mine).sum(0) / (1 + len(mine))
        torch.testing.assert_close(term.centers[label], moved)
    torch.testing.assert_close(term.centers[2], start[2] + 0.4 * 5 / 6 * (embeddings[5] - start[2]))
    assert torch.equal(term.centers[3:], start[3:])
