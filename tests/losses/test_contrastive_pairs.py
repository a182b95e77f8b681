"""InfoNCE, NCE, hard and mixed negatives, KCL, TSC, CoReFace, SpCL, uniformity, bottlenecks: numbers and equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from armillary import collectives, losses
from armillary.components.self_paced import Criterion, agreement, clusters_at, jaccard_distance, trusted
from armillary.losses.embedding_dropout import SampleGuidedContrast
from armillary.losses.hard_negatives import HardNegativeNCE, MixedNegatives, Mixtures, largest_columns
from armillary.losses.hybrid_memory import HybridMemoryLoss
from armillary.losses.info_nce import InfoNCE
from armillary.losses.information_bottleneck import (
    InformationLowerBound,
    VariationalBottleneck,
    kl_of_normals,
    kl_to_standard_normal,
)
from armillary.losses.k_positives import KPositives, assign_targets, uniform_targets
from armillary.losses.key_contrast import KeyContrast
from armillary.losses.noise_contrast import NCE
from armillary.losses.tensors import normalize
from armillary.losses.uniformity import AlignUniform, Uniformity
from armillary.testing.gloo_pool import shared_pool


def t(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


A = t([[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4], [0.2, -0.6, 0.7], [-0.7, -0.2, -0.5]])
B = t([[0.5, 0.6, -0.3], [0.2, 0.7, -0.4], [-0.3, -0.5, 0.6], [-0.6, 0.3, -0.2]])
QUEUE = t([[0.1, 1.0, 0.0], [0.6, 0.6, -0.5], [-1.0, 0.2, 0.1], [0.0, -0.3, 0.9], [0.5, -0.5, -0.7]])
W = t([[1.0, 0.1, 0.0], [0.0, 0.9, -0.2], [0.3, 0.0, 1.1]])
LABELS, QUEUE_LABELS = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 2, 0])
SAME = LABELS[:, None] == QUEUE_LABELS
DRAWN = torch.tensor([[0, 4], [2, -1], [1, 4], [-1, 3]])
ALL_DRAWN = torch.where(SAME, torch.arange(5), -1)
TARGETS = t([[-0.5, -math.sqrt(0.75), 0.0], [1.0, 0.0, 0.0], [-0.5, math.sqrt(0.75), 0.0]])
MU, SIGMA = t([[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4]]), t([[0.5, 1.2, 0.9], [0.8, 0.6, 1.1]])
NOISE = t([[0.3, -1.0, 0.7], [1.1, 0.2, -0.4]])

Loss = Callable[[Tensor], Tensor]


def hard(beta: float, tau_plus: float) -> Loss:
    return lambda view: HardNegativeNCE(beta, tau_plus, 0.5)(view, B)


def coreface(mask: str) -> Loss:
    def value(view: Tensor) -> Tensor:
        loss = SampleGuidedContrast(8.0, 0.99, mask).double()
        loss.margin.fill_(0.1)
        return loss(view, B, LABELS)  # type: ignore[no-any-return]

    return value


def targeted(form: str) -> Loss:
    assigned = torch.tensor([1, 2, 0])
    loss = KPositives(0.2, form=form)
    return lambda view: loss(view, B, QUEUE, DRAWN, targets=TARGETS, target=assigned[LABELS])


def mochi(view: Tensor) -> Tensor:
    """Of a query's three nearest keys the first two, the last two, and the first with the query."""
    nearest = (normalize(view.detach()) @ normalize(QUEUE).T).topk(3, dim=1).indices
    place = nearest.argsort(dim=1).argsort(dim=1)
    mixtures = Mixtures(place[:, :2], place[:, 1:], t([[0.3, 0.6]] * 4), place[:, :1], t([[0.4]] * 4))
    value: Tensor = MixedNegatives(3, 0.2)(view, B, QUEUE, mixtures)
    return value


WORKED: dict[str, tuple[Loss, float, list[float] | None]] = {
    "info_nce": (lambda v: InfoNCE(0.2)(v, B), 0.33528295, [-0.01378814, 0.035906, -0.04409361]),
    "info_nce_queue": (lambda v: KeyContrast(0.2)(v, B, normalize(QUEUE)), 1.17794022, None),
    "info_nce_bilinear": (lambda v: InfoNCE(1.0, normalized=False)(v @ W, B), 0.9341533, None),
    "nt_xent": (lambda v: losses.NTXent(0.5)(v, B), 0.931975, [0.03044832, -0.13307462, 0.07048012]),
    "hard": (hard(1, 0.1), 1.12317174, [0.01617846, -0.12654138, 0.00953238]),
    "debiased": (hard(0, 0.1), 0.71240047, None),
    "harder": (hard(2, 0), 1.44743242, None),
    "plain": (hard(0, 0), 0.931975, [0.03044832, -0.13307462, 0.07048012]),
    "at_floor": (hard(1, 0.5), 0.86734669, None),
    "kcl": (lambda v: KPositives(0.2)(v, B, QUEUE, DRAWN), 3.16656829, None),
    "kcl_all": (lambda v: KPositives(0.2)(v, B, QUEUE, ALL_DRAWN), 3.2879273, None),
    "tsc": (targeted("paper"), 5.36521412, None),
    "tsc_code": (targeted("released_code"), 3.06389387, None),
    "mochi": (mochi, 2.05862832, None),
    "coreface": (coreface("exclude"), 2.14997327, [-0.11814013, 0.3141724, -0.37454439]),
    "coreface_zero": (coreface("zero_cosine"), 1.48604094, None),
    "align_uniform": (lambda v: AlignUniform()(v, B), -2.86815514, [0.25366744, -0.66401895, 0.809494]),
    "uniform_a": (lambda v: Uniformity()(v), -4.98594416, None),
    "uniform_b": (lambda _: Uniformity()(B), -2.00160489, None),
    "supcon_out": (lambda v: losses.SupCon(0.1)(torch.cat([v, B]), LABELS.repeat(2)), 5.39158413, None),
    "supcon_in": (lambda v: losses.SupCon(0.1, "in")(torch.cat([v, B]), LABELS.repeat(2)), 1.58491656, None),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_numbers(name: str) -> None:
    loss, expected, slope = WORKED[name]
    view = A.clone().requires_grad_()
    value = loss(view)
    assert float(value.detach()) == pytest.approx(expected, abs=2e-8)
    if slope is not None:
        value.backward()
        assert view.grad is not None
        assert view.grad[0].tolist() == pytest.approx(slope, abs=2e-8)


def test_nce_worked_number() -> None:
    value = NCE()(t([-1, -0.5]), t([-1.4, -1.2]), t([-2.5, -3, -0.9, -1.7]), t([-1.1, -1.3, -1.2, -1.6]))
    assert float(value) == pytest.approx(1.31641484, abs=1e-8)
    assert float(NCE()(t([-1.0]), t([-1.0]), t([-2.0]), t([-2.0]))) == pytest.approx(2 * math.log(2))
    assert float(NCE()(t([-1.0]), t([-3.0]), t([-2.0]), t([0.5]))) == pytest.approx(
        float(NCE()(t([4.0]), t([2.0]), t([3.0]), t([5.5])))
    )


def test_bottleneck_worked_numbers() -> None:
    assert kl_to_standard_normal(MU, SIGMA).tolist() == pytest.approx([0.79618614, 0.688659], abs=1e-8)
    backward = t([[0.5, 0.0, 0.1], [0.0, 0.6, 0.3]])
    rate = kl_of_normals(MU, SIGMA, backward, torch.ones_like(MU))
    assert float(rate.mean()) == pytest.approx(0.40492257, abs=1e-8)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(MU, SIGMA), normal(backward, 2 * SIGMA)).sum(1)
    torch.testing.assert_close(kl_of_normals(MU, SIGMA, backward, 2 * SIGMA), expected)
    # Moving both means leaves it; equal normals cost nothing.
    torch.testing.assert_close(
        kl_of_normals(MU + 3, SIGMA, backward + 3, SIGMA), kl_of_normals(MU, SIGMA, backward, SIGMA)
    )
    assert float(kl_of_normals(MU, SIGMA, MU, SIGMA).abs().max()) == 0


@pytest.mark.parametrize(("kind", "weight", "expected"), [("vib", 0.01, 0.4048617), ("ceb", 2.0, 1.19979751)])
def test_bottleneck_losses(kind: str, weight: float, expected: float) -> None:
    loss = VariationalBottleneck(3, 3, kind, size=3, weight=weight).double()
    loss.encode.forward = lambda _: (MU, SIGMA)  # type: ignore[method-assign,assignment]
    loss.classify.forward = lambda _: t([[2.0, 0.5, -1.0], [0.1, 1.2, 0.3]])  # type: ignore[method-assign,assignment]
    if kind == "ceb":
        with torch.no_grad():
            loss.class_mean.copy_(t([[0.5, 0.0, 0.1], [0.0, 0.6, 0.3], [9.0, 9.0, 9.0]]))
    assert float(loss(MU, torch.tensor([0, 1]), NOISE)) == pytest.approx(expected, abs=1e-7)


def test_information_lower_bound() -> None:
    means, samples = torch.cat([A, B]), torch.cat([A + 0.1, B - 0.05])
    estimate = InformationLowerBound(20.0)(means, samples)
    assert float(estimate) == pytest.approx(-2.00688519, abs=1e-8)
    own = -(samples - means).square().sum(1).mean() / 20
    assert float(estimate + own + math.log(8)) == pytest.approx(0.07161885, abs=1e-8)
    assert float(InformationLowerBound(1e-4)(means, means) + math.log(8)) <= math.log(8) + 1e-9


def test_targets_and_their_assignment() -> None:
    means = torch.stack([normalize(A)[label == LABELS].mean(0) for label in range(3)])
    assert assign_targets(TARGETS, means).tolist() == [1, 2, 0]
    order = torch.tensor([2, 0, 1])
    assert assign_targets(TARGETS, means[order]).tolist() == [0, 1, 2]
    for count, dim in ((2, 4), (4, 3), (5, 8)):
        products = uniform_targets(count, dim, 0.07, seed=0)
        products = products @ products.T
        expected = torch.full((count, count), -1 / (count - 1)).fill_diagonal_(1)
        torch.testing.assert_close(products, expected, atol=1e-5, rtol=0)
    # Four in a plane: no simplex there, a cross is the best.
    found = uniform_targets(4, 2, 0.3, seed=0)
    assert float((found @ found.T - 2 * torch.eye(4)).max()) == pytest.approx(0, abs=0.02)


def test_uniformity_of_shapes() -> None:
    assert float(Uniformity()(t([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))) == pytest.approx(0, abs=1e-12)
    assert float(Uniformity(3.0)(t([[1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-12)
    assert float(Uniformity()(TARGETS)) == pytest.approx(-2 * 2 * 3 / 2)


def test_hybrid_memory_worked_numbers() -> None:
    query, centres = t([[0.9, 0.1, -0.2]]), normalize(t([[1.0, 0.0, 0.2], [-0.2, 1.0, 0.1]]))
    group = torch.tensor([0, 0, 2, 1, 1])
    arguments = (centres, normalize(QUEUE), group)
    loss = HybridMemoryLoss(0.05)
    assert float(loss(query, torch.tensor([2]), *arguments)) == pytest.approx(8.48448299, abs=1e-7)
    assert float(loss(query, torch.tensor([0]), *arguments)) == pytest.approx(0.00020708, abs=1e-8)
    # Rows that are no candidates, and gaps between the numbers, change nothing.
    rows = torch.cat([normalize(QUEUE), normalize(A)])
    apart = torch.cat([group * 3, torch.full((4,), -1)])
    assert float(loss(query, torch.tensor([2]), centres, rows, apart)) == pytest.approx(8.48448299, abs=1e-7)


def test_agreement_and_trusted_clusters() -> None:
    plain, tight, loose = (torch.tensor(numbers) for numbers in ([0, 0, 0, 1, 1], [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]))
    assert agreement(plain, tight).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1, 1])
    assert agreement(plain, loose).tolist() == pytest.approx([0.6, 0.6, 0.6, 0.4, 0.4])
    # The second cluster is not independent enough; of the first the third sample is not compact.
    groups, _ = trusted(tight, plain, loose, independence=0.5)
    assert groups.tolist() == [0, 0, 1, 2, 3]


def jaccard_slow(rows: Tensor, k1: int, k2: int) -> Tensor:
    """Sets and sums as the paper of 2017 writes them, one pair at a time."""
    unit = [row / row.norm() for row in rows.double()]
    n = len(unit)
    far = [[float((a - b).square().sum()) if i != j else 0.0 for j, b in enumerate(unit)] for i, a in enumerate(unit)]
    rank = [sorted(range(n), key=lambda j, i=i: (j != i, far[i][j])) for i in range(n)]  # type: ignore[misc]

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in rank[i][: k + 1] if i in rank[j][: k + 1]}

    weights = []
    for i in range(n):
        hood = set(reciprocal(i, k1))
        for j in reciprocal(i, k1):
            narrow = reciprocal(j, max(1, round(k1 / 2)))
            if len(narrow & reciprocal(i, k1)) > 2 / 3 * len(narrow):
                hood |= narrow
        raw = [math.exp(-far[i][j]) if j in hood else 0.0 for j in range(n)]
        weights.append([value / sum(raw) for value in raw])
    mean = [[sum(weights[j][c] for j in rank[i][:k2]) / k2 for c in range(n)] for i in range(n)]
    least = [[sum(min(x, y) for x, y in zip(a, b, strict=True)) for b in mean] for a in mean]
    return torch.tensor([[0.0 if i == j else 1 - least[i][j] / (2 - least[i][j]) for j in range(n)] for i in range(n)])


def test_jaccard_distance_is_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 6, generator=draw).repeat_interleave(6, 0) + 0.5 * torch.randn(24, 6, generator=draw)
    found = jaccard_distance(rows, k1=5, k2=3)
    torch.testing.assert_close(found, jaccard_slow(rows, 5, 3), atol=1e-5, rtol=0)
    clusters = clusters_at(found, Criterion(0.6, 0.02, 2))
    # With a larger radius clusters only grow together.
    for smaller, larger in pairwise(clusters):
        several = [number for number in smaller.unique() if (smaller == number).sum() > 1]
        assert several
        assert all(len(larger[smaller == number].unique()) == 1 for number in several)


def hard_slow(view1: Tensor, view2: Tensor, beta: float, tau_plus: float, tau: float) -> float:
    """The equation by loops over anchors and negatives."""
    rows = [row / row.norm() for row in torch.cat([view1, view2])]
    count, total = len(view1), 0.0
    for i, anchor in enumerate(rows):
        partner = (i + count) % (2 * count)
        p = math.exp(float(anchor @ rows[partner]) / tau)
        n = [math.exp(float(anchor @ rows[j]) / tau) for j in range(2 * count) if j not in (i, partner)]
        mean = sum(value**beta for value in n) / len(n)
        r = sum(value**beta / mean * value for value in n)
        g = max((r - len(n) * tau_plus * p) / (1 - tau_plus), len(n) * math.exp(-1 / tau))
        total -= math.log(p / (p + g)) / (2 * count)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.4])
def test_hard_negatives_are_their_equation(beta: float, tau_plus: float) -> None:
    draw = torch.Generator().manual_seed(1)
    one = torch.randn(7, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    two = one.detach() + torch.randn(7, 5, generator=draw, dtype=torch.float64)
    loss = HardNegativeNCE(beta, tau_plus, 0.3)
    assert float(loss(one, two).detach()) == pytest.approx(hard_slow(one.detach(), two, beta, tau_plus, 0.3), rel=1e-10)
    assert torch.autograd.gradcheck(lambda view: loss(view, two), (one,))


def test_hard_negatives_at_small_temperatures() -> None:
    one = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for beta in (0.0, 1.0, 3.0):
        value = HardNegativeNCE(beta, 0.1, 0.005)(one, one.detach().flip(0))
        value.backward()
        assert torch.isfinite(value)
        assert one.grad is not None
        assert torch.isfinite(one.grad).all()


def mixed_one_by_one(view: Tensor, keys: Tensor, queue: Tensor, given: Mixtures, hardest: int) -> Tensor:
    """MoCHi as it is written: every mixture is made, and meets its query."""
    total = view.new_zeros(())
    for row in range(len(view)):
        q, k, queued = normalize(view[row]), normalize(keys[row]), normalize(queue)
        near = queued[(queued @ q.detach()).topk(hardest).indices.sort().values]
        a, b = given.weight[row][:, None], given.query_weight[row][:, None]
        pairs = normalize(a * near[given.first[row]] + (1 - a) * near[given.second[row]])
        of_query = normalize(b * q.detach() + (1 - b) * near[given.key[row]])
        logits = torch.cat([k[None], queued, pairs, of_query]) @ q / 0.2
        total = total + logits.logsumexp(0) - logits[0]
    return total / len(view)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("twice", [False, True])
def test_mixtures_as_they_are_written(monkeypatch: pytest.MonkeyPatch, threads: int, twice: bool) -> None:
    """In several blocks, by either selection, with keys that stand in the queue twice."""
    monkeypatch.setattr("armillary.losses.blocks.BLOCK_ELEMENTS", 16 * 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = torch.Generator().manual_seed(3)
    view, keys, queue = (torch.randn(rows, 6, generator=draw, dtype=torch.float64) for rows in (37, 37, 40))
    if twice:
        queue[20:] = queue[:20]
    hardest = 8 if twice else 9

    def places(count: int) -> Tensor:
        return torch.randint(0, hardest, (37, count), generator=draw)

    weight, of_query = (torch.rand(37, count, generator=draw, dtype=torch.float64) for count in (12, 5))
    given = Mixtures(places(12), places(12), weight, places(5), of_query / 2)
    one, other = view.clone().requires_grad_(), view.clone().requires_grad_()
    metrics: dict[str, Tensor] = {}
    value = MixedNegatives(hardest, 0.2)(one, keys, queue, given, metrics=metrics)
    expected = mixed_one_by_one(other, keys, queue, given, hardest)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert float((normalize(view) @ normalize(queue).T).amax(dim=1).mean()) <= float(metrics["hardest_cosine"]) <= 1


@pytest.mark.parametrize("threads", [1, 8])
def test_the_largest_columns(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    scores = torch.tensor([[1.0, 5.0, 3.0, 4.0], [2.0, 2.0, 2.0, 9.0]])
    assert largest_columns(scores[:1], 2).tolist() == [[1, 3]]
    # Of equal scores any may be taken, but two they are.
    tied = largest_columns(scores, 2)
    assert tied[0].tolist() == [1, 3]
    assert tied[1, 1] == 3
    assert tied[1, 0] < 3
    assert largest_columns(scores, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_dropped_positives_leave_the_denominator() -> None:
    """Only those of the class that were not drawn; and the mask must be given."""
    key, queue, v = normalize(B), normalize(QUEUE), normalize(A)
    logits = torch.cat([(v * key).sum(dim=1, keepdim=True), v @ queue.T], dim=1) / 0.2
    drawn = torch.zeros_like(SAME)
    for row, column in (DRAWN >= 0).nonzero().tolist():
        drawn[row, DRAWN[row, column]] = True
    own = torch.ones(4, 1, dtype=torch.bool)
    positive = torch.cat([own, drawn], dim=1)
    kept = torch.cat([own, drawn | ~SAME], dim=1)
    below = logits.masked_fill(~kept, -torch.inf).logsumexp(dim=1, keepdim=True)
    expected = ((below - logits) * positive).sum(dim=1) / positive.sum(dim=1)
    value = KPositives(0.2, "drop")(A, B, QUEUE, DRAWN, same=SAME)
    torch.testing.assert_close(value, expected.mean())
    with pytest.raises(ValueError, match="same"):
        KPositives(0.2, "drop")(A, B, QUEUE, DRAWN)


def test_equalities() -> None:
    """Losses that become others."""
    unique = torch.arange(4)
    torch.testing.assert_close(coreface_of(0.0)(A, B, unique), InfoNCE(1 / 8)(A, B))
    none = torch.full((4, 0), -1)
    torch.testing.assert_close(KPositives(0.2)(A, B, QUEUE, none), KeyContrast(0.2)(A, B, normalize(QUEUE)))
    torch.testing.assert_close(MixedNegatives(3, 0.2)(A, B, QUEUE), KeyContrast(0.2)(A, B, normalize(QUEUE)))
    assert float(mochi(A)) > float(MixedNegatives(3, 0.2)(A, B, QUEUE))
    torch.testing.assert_close(losses.SupCon(0.5)(torch.cat([A, B]), unique.repeat(2)), losses.NTXent(0.5)(A, B))
    margins = [float(coreface_of(m)(A, B, LABELS)) for m in (0.0, 0.2, 0.5)]
    assert margins == sorted(margins)


def coreface_of(margin: float) -> SampleGuidedContrast:
    """The contrastive term with a margin that hardly moves."""
    loss = SampleGuidedContrast(8.0, 1e-12).double()
    loss.margin.fill_(margin)
    return loss


@pytest.mark.parity
def test_like_pytorch_metric_learning() -> None:
    """Its NT-Xent pairs each positive with all negatives: with two views per image it is ours and SupCon's."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    view, other = A.clone().requires_grad_(), A.clone().requires_grad_()
    keys = torch.arange(4).repeat(2)
    value, expected = losses.NTXent(0.3)(view, B), theirs.NTXentLoss(0.3)(torch.cat([other, B]), keys)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(view.grad, other.grad, rtol=1e-5, atol=1e-5)


DISTRIBUTED = ("hard", "coreface", "align_uniform", "bound", "info_nce")


def of_kind(kind: str, one: Tensor, two: Tensor, label: Tensor) -> Tensor:
    made: dict[str, Callable[[], Tensor]] = {
        "hard": lambda: HardNegativeNCE(1.5, 0.1, 0.4)(one, two),
        "coreface": lambda: SampleGuidedContrast(8.0, direction="both").double()(one, two, label),
        "align_uniform": lambda: AlignUniform()(one, two),
        "bound": lambda: InformationLowerBound()(one, two),
        "info_nce": lambda: InfoNCE(0.2)(one, two),
    }
    return made[kind]()


def views() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    one = torch.randn(8, 5, generator=draw, dtype=torch.float64)
    two = one + 0.4 * torch.randn(8, 5, generator=draw, dtype=torch.float64)
    return one, two, torch.tensor([0, 1, 2, 0, 0, 0, 0, 1])


def part(kind: str) -> list[float]:
    """One rank's loss on its half, and its half's gradient over the number of ranks."""
    one, two, label = views()
    mine = slice(collectives.rank() * 4, collectives.rank() * 4 + 4)
    own = one[mine].clone().requires_grad_()
    value = of_kind(kind, own, two[mine], label[mine])
    value.backward()
    assert own.grad is not None
    return [float(value.detach()), *(own.grad / collectives.world_size()).flatten().tolist()]


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_two_workers_equal_one(kind: str) -> None:
    one, two, label = views()
    one.requires_grad_()
    value = of_kind(kind, one, two, label)
    value.backward()
    assert one.grad is not None
    both = shared_pool().run(part, kind)
    assert sum(rank[0] for rank in both) / 2 == pytest.approx(float(value.detach()), rel=1e-10)
    assert both[0][1:] + both[1][1:] == pytest.approx(one.grad.flatten().tolist(), rel=1e-8, abs=1e-12)
