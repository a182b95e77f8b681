"""Losses with clusters: worked numbers, limits, and what the objectives around them draw and rebuild."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.components.clustering import Clusters, concentrations
from armillary.components.sinkhorn import sinkhorn
from armillary.losses.cluster_contrast import (
    SwappedPrediction,
    expert_log_likelihoods,
    keep_probability,
    mixture_loss,
    prototype_contrast,
    selected_instance_contrast,
)
from armillary.losses.key_contrast import KeyContrast
from armillary.losses.tensors import normalize
from armillary.objectives.expert_mixture import separated_directions
from armillary.objectives.prototypical import cluster_counts
from armillary.objectives.registry import get
from armillary.spec.errors import UserError
from armillary.testing.steps import Case


def rows(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SCORES = torch.stack(
    [
        rows([[0.9, 0.1, -0.2], [0.8, 0.3, 0.0], [0.7, -0.1, 0.4], [0.2, 0.6, 0.5]]),
        rows([[0.7, 0.2, -0.1], [0.9, 0.1, 0.1], [0.5, 0.0, 0.6], [0.1, 0.7, 0.3]]),
    ]
)
QUEUE = normalize(rows([[1, 1, 0], [0, 1, 1], [1, 0, 1], [-1, 1, 0], [0, -1, 1]]))


class TestSwAV:
    def test_worked_number(self) -> None:
        codes = torch.stack([sinkhorn(view, 0.05, 3) for view in SCORES])
        assert float(SwappedPrediction()(SCORES, codes)) == pytest.approx(0.74761303, abs=1e-8)
        logs = (SCORES / 0.1).log_softmax(2)
        assert float(-(codes[0] * logs[1]).sum(1).mean()) == pytest.approx(0.62819044, abs=1e-8)

    def test_what_changes_nothing(self) -> None:
        codes = torch.stack([sinkhorn(view, 0.05, 3) for view in SCORES])
        value = SwappedPrediction()(SCORES, codes)
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(SwappedPrediction()(SCORES[:, :, order], codes[:, :, order]), value)
        torch.testing.assert_close(SwappedPrediction()(SCORES.flip(0), codes.flip(0)), value)

    def test_equal_scores_say_nothing(self) -> None:
        same = torch.zeros(2, 4, 3, dtype=torch.float64)
        codes = torch.stack([sinkhorn(view) for view in same])
        assert float(SwappedPrediction()(same, codes)) == pytest.approx(math.log(3))

    def test_small_crops_predict_and_are_not_predicted(self) -> None:
        codes = torch.stack([sinkhorn(view, 0.05, 3) for view in SCORES])
        three = torch.cat([SCORES, SCORES[:1].flip(1)])
        logs = (three / 0.1).log_softmax(2)
        expected = sum(
            float(-(codes[g, b] * logs[v, b]).sum()) for g in range(2) for v in range(3) for b in range(4) if v != g
        )
        assert float(SwappedPrediction()(three, codes)) == pytest.approx(expected / (2 * 2 * 4))


class TestPrototypes:
    points = rows([[1.0, 0.1, 0.0], [0.9, -0.1, 0.1], [0.0, 1.0, 0.2], [0.1, 0.9, -0.1], [-0.1, 1.1, 0.0]])

    def clusters(self) -> Clusters:
        points, labels = normalize(self.points), torch.tensor([0, 0, 1, 1, 1])
        centroids = torch.stack([points[:2].mean(0), points[2:].mean(0)])
        return Clusters(centroids, labels, (points - centroids[labels]).norm(dim=1))

    def test_worked_number(self) -> None:
        found = self.clusters()
        widths = rows([[0.18122256, 0.21877744]])[0]
        queries = rows([[0.5, -1.2, 0.3], [1.0, 0.4, -0.7]])
        keys = rows([[0.6, -1.0, 0.1], [0.8, 0.6, -0.9]])
        queue = normalize(rows([[1, 1, 0], [0, 1, 1], [1, 0, 1], [-1, 1, 0], [0, -1, 1]]))
        term = prototype_contrast(queries, found.prototypes, widths, torch.tensor([0, 1])).mean()
        assert float(term) == pytest.approx(1.4026678, abs=1e-6)
        instance = KeyContrast(0.2)(queries, keys, queue)
        assert float(instance) == pytest.approx(0.35764398, abs=1e-7)

    def test_equal_widths_are_one_temperature(self) -> None:
        found = self.clusters()
        queries = normalize(rows([[0.5, -1.2, 0.3], [1.0, 0.4, -0.7]]))
        own = torch.tensor([0, 1])
        logits = queries @ found.prototypes.T / 0.2
        expected = torch.nn.functional.cross_entropy(logits, own)
        widths = torch.full((2,), 0.2, dtype=torch.float64)
        torch.testing.assert_close(prototype_contrast(queries, found.prototypes, widths, own).mean(), expected)

    def test_no_cluster_is_left_out(self) -> None:
        found = self.clusters()
        padded = torch.cat([found.prototypes, torch.zeros(3, 3, dtype=torch.float64)])
        queries, own = rows([[0.5, -1.2, 0.3]]), torch.tensor([1])
        widths = torch.full((5,), 0.2, dtype=torch.float64)
        torch.testing.assert_close(
            prototype_contrast(queries, padded, widths, own),
            prototype_contrast(queries, found.prototypes, widths[:2], own),
        )

    def test_the_mean_width_is_the_temperature(self) -> None:
        assert float(concentrations(self.clusters(), 0.2).mean()) == pytest.approx(0.2)


class TestSelection:
    prototypes = normalize(rows([[1.0, 0.2, 0.0], [0.0, 1.0, 0.3], [-0.5, 0.2, 1.0]]))
    widths = rows([[0.2, 0.25, 0.3]])[0]

    def test_keep_probability(self) -> None:
        found = keep_probability(QUEUE, self.prototypes, self.widths, torch.tensor([0]))
        expected = [0.1952892, 0.9582485, 0.1367867, 0.99677353, 0.91542159]
        assert found[0].tolist() == pytest.approx(expected, abs=1e-7)
        every = keep_probability(QUEUE, self.prototypes, self.widths, torch.arange(3))
        torch.testing.assert_close(every.sum(0), torch.full((5,), 2.0, dtype=torch.float64))

    def test_removed_negatives(self) -> None:
        query, key = rows([[0.5, -1.2, 0.3]]), rows([[0.6, -1.0, 0.1]])
        keep = torch.tensor([[True, False, True, True, False]])
        loss = selected_instance_contrast(query, key, QUEUE, keep, 0.2)
        assert float(loss) == pytest.approx(0.06143423, abs=1e-8)
        nothing = selected_instance_contrast(query, key, QUEUE, torch.zeros_like(keep), 0.2)
        torch.testing.assert_close(nothing.mean(), KeyContrast(0.2)(query, key, QUEUE))


class TestMixture:
    f = rows([[0.5, -1.0], [1.0, 0.2], [-0.3, 0.8], [0.6, -0.4]]).view(2, 2, 2)
    v = rows([[0.4, -0.9], [0.9, 0.3], [-0.2, 1.0], [0.5, -0.6]]).view(2, 2, 2)
    queue = normalize(rows([[1, 0], [0, 1], [-1, 0.5], [0.3, -0.8], [0.2, 0.2], [-0.6, 0.1]]).view(3, 2, 2))

    def test_worked_number(self) -> None:
        gates = normalize(rows([[1.0, 0.3], [-0.2, 0.9]])).log_softmax(1)
        likelihoods = expert_log_likelihoods(self.f, self.v, rows([[0.7, -0.7], [0.2, 1.0]]), self.queue, 1.0)
        posterior = (gates + likelihoods).softmax(1)
        assert posterior.flatten().tolist() == pytest.approx([0.70368883, 0.29631117, 0.18118357, 0.81881643], abs=1e-7)
        assert float(mixture_loss(gates, likelihoods)) == pytest.approx(0.8561199, abs=1e-7)

    def test_one_expert_without_a_centre_is_momentum_contrast(self) -> None:
        zero = torch.zeros(1, 2, dtype=torch.float64)
        likelihoods = expert_log_likelihoods(self.f[:, :1], self.v[:, :1], zero, self.queue[:, :1], 0.5)
        loss = mixture_loss(torch.zeros(2, 1, dtype=torch.float64), likelihoods)
        torch.testing.assert_close(loss, KeyContrast(0.5)(self.f[:, 0], self.v[:, 0], self.queue[:, 0]))

    @pytest.mark.parametrize(("count", "dim"), [(2, 1), (3, 2), (10, 16), (4, 3)])
    def test_directions_stand_as_far_apart_as_can_be(self, count: int, dim: int) -> None:
        directions = separated_directions(count, dim)
        cosines = directions @ directions.T
        expected = torch.full((count, count), -1 / (count - 1)).fill_diagonal_(1)
        torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)
        assert separated_directions(9, 3).norm(dim=1).tolist() == pytest.approx([1.0] * 9)


def test_experts_remember_the_winners_of_every_micro_batch() -> None:
    """Two halves of a batch before one optimizer step count as the whole batch does."""
    case = Case(get("mice"), {"experts": 3, "projection_dim": 4})
    batch = case.batch()
    won = []
    for parts in ([batch], [batch.rows(slice(0, 6)), batch.rows(slice(6, 12))]):
        objective: Any = case.build(dtype=torch.float64).eval()
        for part in parts:
            objective(replace(part, views=tuple(view.double() for view in part.views)))
        objective.after_step(0)
        won.append(objective.centres.wins.clone())
    torch.testing.assert_close(won[0], won[1])
    assert float(won[0].norm()) > 0


class TestClusterCounts:
    """How many clusters PCL and HCSC make of a training set."""

    PAPER = (25_000, 50_000, 100_000)

    def test_the_papers_on_imagenet(self) -> None:
        assert cluster_counts(None, self.PAPER, 1_281_167) == self.PAPER

    def test_fewer_on_fewer_images(self) -> None:
        """Digits: the finest has a dozen images a cluster, the others keep their ratios."""
        assert cluster_counts(None, self.PAPER, 1437) == (28, 56, 112)
        assert cluster_counts(None, (3000, 2000, 1000), 10) == (2, 2, 2)

    def test_every_image_its_own_cluster_is_refused(self) -> None:
        assert cluster_counts((9, 3), self.PAPER, 10) == (9, 3)
        with pytest.raises(UserError, match="found 10 clusters for 10 training samples"):
            cluster_counts((10, 3), self.PAPER, 10)
