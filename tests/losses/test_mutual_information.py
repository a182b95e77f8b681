"""Bounds on mutual information: worked numbers, loops, what bounds them; CPC, DIM and AMDIM around them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.losses.info_nce import InfoNCE
from armillary.losses.mutual_information import (
    AcrossScales,
    InformationBound,
    PriorMatching,
    place_nce,
    scores_of_places,
)
from armillary.objectives import get
from armillary.testing import tiny
from armillary.testing.gloo_pool import shared_pool

# Rows are images, columns vectors; the bounds take vectors as rows.
CRITIC = torch.tensor([[1.2, -0.3, 0.1], [-0.5, 0.8, 0.0], [0.2, -0.7, 1.5]], dtype=torch.float64).T[:, :, None]


@pytest.mark.parametrize(("measure", "estimate"), [("jsd", -0.88981564), ("dv", 1.31545522), ("infonce", -0.42193802)])
def test_worked_bounds(measure: str, estimate: float) -> None:
    loss = float(InformationBound(measure)(CRITIC))
    assert loss == pytest.approx(-estimate, abs=1e-8)
    if measure == "jsd":
        assert loss - 2 * math.log(2) == pytest.approx(-0.49647873, abs=1e-8)


def test_infonce_compares_images_for_each_vector() -> None:
    """As the paper's equation and code do; the other way round, vectors for each image, it is another number."""
    by_columns = -CRITIC[..., 0].log_softmax(dim=1).diagonal().mean()
    assert float(InformationBound("infonce")(CRITIC)) == pytest.approx(float(by_columns), rel=1e-12)
    assert float(InformationBound("infonce")(CRITIC.transpose(0, 1))) == pytest.approx(0.43667399, abs=1e-8)


def test_what_bounds_the_bounds() -> None:
    assert float(InformationBound("jsd")(0 * CRITIC)) == pytest.approx(2 * math.log(2))
    assert float(InformationBound("dv")(0 * CRITIC)) == pytest.approx(0)
    assert float(InformationBound("infonce")(0 * CRITIC)) == pytest.approx(math.log(3))
    apart = torch.eye(3, dtype=torch.float64)[:, :, None] * 200 - 100
    for measure in ("jsd", "infonce"):
        assert 0 <= float(InformationBound(measure)(apart)) < 1e-20
        assert float(InformationBound(measure)(torch.randn(4, 4, 3, dtype=torch.float64))) > 0


def test_dv_does_not_overflow() -> None:
    assert float(InformationBound("dv")((CRITIC * 1000).float())) == pytest.approx(
        1000 * (0.2 - (1.2 + 0.8 + 1.5) / 3) - math.log(6), rel=1e-4
    )


def noise(images: int = 4, places: int = 3, dim: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(images, dim, generator=draw, dtype=torch.float64)
    return vectors, torch.randn(images, places, dim, generator=draw, dtype=torch.float64)


def place_nce_slow(scores: Tensor) -> float:
    total, images, places = 0.0, scores.shape[0], scores.shape[2]
    for j in range(images):
        others = sum(math.exp(scores[j, i, q]) for i in range(images) if i != j for q in range(places))
        for p in range(places):
            positive = math.exp(scores[j, j, p])
            total -= math.log(positive / (positive + others)) / (images * places)
    return total


def jsd_slow(scores: Tensor) -> float:
    def softplus(u: float) -> float:
        return math.log1p(math.exp(u))

    images, places = scores.shape[0], scores.shape[2]
    joint = [softplus(-float(scores[j, j, p])) for j in range(images) for p in range(places)]
    rest = [
        softplus(float(scores[j, i, p])) for j in range(images) for i in range(images) if i != j for p in range(places)
    ]
    return sum(joint) / len(joint) + sum(rest) / len(rest)


def test_bounds_are_their_equations() -> None:
    scores = scores_of_places(*noise())
    assert float(place_nce(scores)) == pytest.approx(place_nce_slow(scores), rel=1e-12)
    assert float(InformationBound("jsd")(scores)) == pytest.approx(jsd_slow(scores), rel=1e-12)


SOURCE = [[3.0, -1.0, 2.0, 0.5], [0.5, 2.0, -1.5, 1.0]]
PLACES = [[[2.0, -0.5, 1.5, 0.0], [1.0, 0.0, 2.5, 1.0]], [[0.0, 1.5, -1.0, 0.5], [1.0, 1.0, -2.0, 2.0]]]


def test_a_worked_term_of_amdim() -> None:
    vectors, places = (torch.tensor(rows, dtype=torch.float64) for rows in (SOURCE, PLACES))
    expected = [[[4.75, 4.25], [-1.625, -0.5]], [[-1.125, -1.125], [2.5, 3.75]]]
    assert (scores_of_places(vectors, places) / 2).tolist() == expected
    metrics: dict[str, Tensor] = {}
    loss = AcrossScales(10.0, 0.04)(vectors, places, metrics=metrics)
    assert float(metrics["nce"]) == pytest.approx(0.02422659, abs=1e-8)
    assert float(metrics["penalty"]) == pytest.approx(0.33179688, abs=1e-8)
    assert float(loss) == pytest.approx(0.35602346, abs=1e-8)


def test_the_penalty_pulls_on_unclipped_scores() -> None:
    """d penalty / d u = 2 lambda u / numel, however far u is beyond the clip."""
    vectors, places = noise()
    vectors = (100 * vectors).requires_grad_()
    AcrossScales(1e-3, 0.04)(vectors, places).backward()
    u = scores_of_places(vectors, places).detach() / math.sqrt(5)
    expected = torch.einsum("jip,ipd->jd", 2 * 0.04 * u / u.numel(), places) / math.sqrt(5)
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-3, atol=1e-3)


def test_one_place_and_no_clip_is_infonce() -> None:
    vectors, places = noise(places=1)
    plain = InfoNCE(temperature=1.0, normalized=False)(vectors, places[:, 0])
    torch.testing.assert_close(place_nce(scores_of_places(vectors, places)), plain)


@pytest.mark.parametrize("measure", ["jsd", "infonce", "dv"])
def test_one_image_is_finite(measure: str) -> None:
    vectors, places = noise(images=1)
    vectors.requires_grad_()
    loss = InformationBound(measure)(scores_of_places(vectors, places))
    loss.backward()
    assert torch.isfinite(loss)
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


def test_the_prior_turns_the_gradient_round() -> None:
    """The discriminator descends on its loss, the encoder's vectors ascend on it."""
    torch.manual_seed(0)
    prior = PriorMatching(torch.nn.Linear(3, 1).double())
    vectors = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    cube = torch.rand(4, 3, dtype=torch.float64)
    loss = prior(vectors, cube)
    loss.backward()
    told = torch.nn.functional.softplus(prior.discriminator(vectors)).mean()
    (forward,) = torch.autograd.grad(told, vectors)
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, -forward)
    blind = PriorMatching(torch.nn.Linear(3, 1).double())
    torch.nn.init.zeros_(blind.discriminator.weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(blind.discriminator.bias)  # type: ignore[arg-type]
    assert float(blind(vectors, cube).detach()) == pytest.approx(2 * math.log(2))


def part(measure: str, rank_of: int) -> tuple[float, list[float]]:
    from armillary import collectives

    vectors, places = noise()
    mine = slice(collectives.rank() * rank_of, (collectives.rank() + 1) * rank_of)
    own = vectors[mine].clone().requires_grad_()
    loss = InformationBound(measure)(scores_of_places(own, places[mine]))
    loss.backward()
    assert own.grad is not None
    return float(loss.detach()), (own.grad / collectives.world_size()).flatten().tolist()


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("measure", ["jsd", "infonce", "dv"])
def test_two_workers_equal_one(measure: str) -> None:
    vectors, places = noise()
    vectors.requires_grad_()
    loss = InformationBound(measure)(scores_of_places(vectors, places))
    loss.backward()
    assert vectors.grad is not None
    both = shared_pool().run(part, measure, 2)
    assert sum(value for value, _ in both) / 2 == pytest.approx(float(loss.detach()), rel=1e-10)
    assert both[0][1] + both[1][1] == pytest.approx(vectors.grad.flatten().tolist(), rel=1e-8, abs=1e-12)


def test_a_worked_prediction_of_cpc() -> None:
    z = torch.tensor([[0.5, -1.2, 0.3], [1.0, 0.4, -0.7], [-0.8, 0.9, 0.1]], dtype=torch.float64)
    w = torch.tensor([[0.5, 0.1, 0.0], [-0.2, 0.4, 0.3], [0.1, 0.0, 0.6]], dtype=torch.float64)
    c = torch.tensor([[0.1, -0.9, 0.5], [1.1, 0.2, -0.4], [-0.6, 0.7, 0.3]], dtype=torch.float64)
    loss = float(InfoNCE(temperature=1.0, normalized=False)(c @ w.T, z))
    assert loss == pytest.approx(0.70895032, abs=1e-8)
    assert math.log(3) - loss == pytest.approx(0.38966197, abs=1e-8)


def cpc(**options: Any) -> Any:
    return tiny.build(get("cpc"), options).double().eval()


def test_cpc_is_its_equation() -> None:
    """The objective's loss by loops over contexts, from its own patches, contexts and maps."""
    objective = cpc()
    batch = tiny.batch(objective.needs, 3, dtype=torch.float64)
    with torch.no_grad():
        output = objective(batch)
        cut = objective.patches_of(batch.views[0])
        z = objective.encoder(cut.flatten(0, 2)).unflatten(0, (3, 5, 5))
        c = objective.context(z.permute(0, 3, 1, 2))
        total = 0.0
        for k, predictor in enumerate(objective.predictors, start=1):
            terms = []
            for image in range(3):
                for row in range(5 - k):
                    for column in range(5):
                        f = z.flatten(0, 2) @ predictor(c[image, :, row, column])
                        terms.append(
                            float(f.logsumexp(0) - z[image, row + k, column] @ predictor(c[image, :, row, column]))
                        )
            total += sum(terms) / len(terms)
    assert float(output.loss) == pytest.approx(total, rel=1e-10)
    assert float(output.metrics["bound"]) == pytest.approx(math.log(75) - total / 2, rel=1e-9)


def test_contexts_do_not_look_down() -> None:
    """What changes in a row changes no context above it."""
    objective = cpc()
    vectors = torch.rand(2, 8, 5, 5, dtype=torch.float64)
    changed = vectors.clone()
    changed[:, :, 3] += 1
    before, after = objective.context(vectors), objective.context(changed)
    torch.testing.assert_close(after[:, :, :3], before[:, :, :3])
    assert (after[:, :, 3] - before[:, :, 3]).abs().min() > 0


def test_patches_overlap_by_half() -> None:
    objective = cpc()
    image = torch.arange(36, dtype=torch.float64).view(1, 1, 6, 6)
    cut = objective.patches_of(image)
    assert cut.shape == (1, 5, 5, 1, 2, 2)
    assert cut[0, 1, 2, 0].tolist() == [[8, 9], [14, 15]]


def test_the_global_bound_has_the_whole_map_as_its_place() -> None:
    dim = tiny.build(get("dim"), {"alpha": 1.0, "beta": 0.0, "gamma": 0.0})
    assert not hasattr(dim, "prior")
    assert torch.isfinite(dim(tiny.batch(dim.needs)).loss)
