"""Objectives with stages, policies, queues and clusters: what happens between steps and epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from armillary.losses.sample_margins import MagFace
from armillary.losses.subclusters import neighbor_accuracy
from armillary.objectives import Batch, Objective
from armillary.objectives.adaptive_margin import FairLoss, QMagFaceObjective
from armillary.objectives.image_sets import SetDDC
from armillary.objectives.probabilistic import SphericalConfidenceObjective
from armillary.objectives.queued_margin import BroadFaceObjective, QGFaceObjective
from armillary.testing import tiny
from armillary.testing.convergence import fit, preset_job
from armillary.training.preflight import plan


def make(cls: type[Objective], **options: Any) -> tuple[Any, Batch]:
    objective = tiny.build(cls, options, dtype=torch.float64)
    needs = cls.needs_for(objective.hyperparameters)
    return objective, tiny.batch(needs, dtype=torch.float64)


def step(objective: Any, batch: Batch, number: int = 0, lr: float = 0.05) -> float:
    objective.step = number
    objective.zero_grad(set_to_none=True)
    loss = objective(batch).loss
    loss.backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    objective.after_step(number)
    return float(loss.detach())


def test_qmagface_trains_as_magface() -> None:
    objective, batch = make(QMagFaceObjective, norm_low=0.1, norm_high=5.0)
    loss = MagFace(tiny.NUM_CLASSES, tiny.EMBEDDING_DIM, norm_low=0.1, norm_high=5.0).double()
    loss.load_state_dict(objective.loss.state_dict())
    found = objective.eval()(batch).loss
    torch.testing.assert_close(found, loss(objective.encoder(batch.views[0]), batch.label), rtol=1e-9, atol=1e-9)


def test_fair_loss_moves_margins_between_epochs() -> None:
    """Random moves while exploring teach the table, the best ones after that do not; margins stay on the grid."""
    objective, batch = make(FairLoss, explore=0.5)
    seen = []
    for epoch in range(4):
        objective.epoch = epoch
        before = objective.level.clone()
        objective.before_epoch(epoch, lambda: iter([batch]))
        torch.testing.assert_close(objective.loss.class_margins, objective.policy.grid[objective.level])
        assert int((objective.level - before).abs().max()) <= 1
        seen.append(int(objective.policy.visits.sum()))
        if epoch >= 2:
            assert torch.equal(objective.action, objective.policy.best(objective.state))
        step(objective, batch, epoch)
    assert seen == [0, 4, 8, 8]
    assert objective.epoch_metrics()["class_margin"] == objective.loss.class_margins.mean()


def test_fair_loss_moves_margins_in_a_run_of_one_epoch() -> None:
    ready = plan(preset_job(FairLoss, {"train.epochs": 1}))
    objective: Any = ready.build()
    (metrics,) = fit(objective, ready)
    assert (torch.bincount(objective.level, minlength=4) > 0).sum() == 3, "lower, kept and raised ones"
    assert metrics["class_margin_deviation"] == pytest.approx(float(objective.loss.class_margins.std(correction=0)))
    assert metrics["class_margin_deviation"] > 0.05


def test_fair_loss_rewards_separation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table learns from, against distances measured image by image."""
    objective, batch = make(FairLoss, explore=1.0)
    taught: list[list[torch.Tensor]] = []
    monkeypatch.setattr(objective.policy, "learn", lambda *seen: taught.append([part.clone() for part in seen]))

    def separations() -> list[float]:
        objective.eval()
        embeddings = objective.encoder(batch.views[0]).detach()
        units = [row / row.norm() for row in embeddings]
        axes = []
        for label in range(tiny.NUM_CLASSES):
            total = sum(unit for unit, own in zip(units, batch.label.tolist(), strict=True) if own == label)
            axes.append(total / total.norm())
        found = []
        for label, axis in enumerate(axes):
            own = [1 - float(unit @ axis) for unit, y in zip(units, batch.label.tolist(), strict=True) if y == label]
            between = min(1 - float(axis @ other) for number, other in enumerate(axes) if number != label)
            found.append(between - sum(own) / len(own))
        objective.train()
        return found

    before = separations()
    objective.before_epoch(0, lambda: iter([batch]))
    state, action = objective.state.clone(), objective.action.clone()
    for number in range(20):
        step(objective, batch, number, lr=0.5)
    after = separations()
    objective.before_epoch(1, lambda: iter([batch]))
    ((old_state, old_action, reward, new_state),) = taught
    assert torch.equal(old_state, state)
    assert torch.equal(old_action, action)
    assert torch.equal(new_state, objective.state)
    assert max(abs(x - y) for x, y in zip(before, after, strict=True)) > 0.001, "training changed something"
    assert reward.tolist() == pytest.approx([y - x for x, y in zip(before, after, strict=True)], abs=1e-6)


def test_fair_loss_measures_distances() -> None:
    """Distances of hand-made directions: spread within a class, and to the nearest other class."""
    objective, _ = make(FairLoss)
    directions = torch.tensor([[1.0, 0.2], [1.0, -0.2], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)

    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return directions[images[:, 0, 0, 0].long()]

    objective.encoder = Fixed()
    images = torch.arange(4, dtype=torch.float64)[:, None, None, None]
    given = Batch((images,), torch.arange(4), {"label": torch.tensor([0, 0, 1, 1])})
    intra, inter = objective._distances(lambda: iter([given]))
    cosine = 1 / (1 + 0.2**2) ** 0.5
    assert intra[:2].tolist() == pytest.approx([1 - cosine, 0], abs=1e-6)
    assert inter[:2].tolist() == pytest.approx([1, 1], abs=1e-6)


def test_fair_loss_policy_sees_what_its_choice_did() -> None:
    """The second appearance of a class teaches the survey's policy."""
    objective, batch = make(FairLoss, formulation="survey", entropy=0.0)
    step(objective, batch, 0)
    assert bool(objective.policy.seen.all())
    objective.zero_grad(set_to_none=True)
    objective.step = 1
    output = objective(batch)
    output.loss.backward()
    gain = objective.policy.last_loss - objective._chosen[3]
    assert float(output.metrics["surrogate"]) == pytest.approx(-float(gain.mean()), abs=1e-6)
    assert float(objective.policy.scores.weight.grad.abs().max()) > 0


def test_confidence_has_two_stages() -> None:
    """Stage two trains the branch alone, on a copy of the encoder taken at its start, which is what is exported."""
    objective, batch = make(SphericalConfidenceObjective, frozen_share=0.5)
    assert objective.second_stage == 2
    for epoch in range(2):
        objective.epoch = epoch
        objective.before_epoch(epoch, lambda: iter([batch]))
        step(objective, batch, epoch)
        assert objective.exported() is objective.encoder
    objective.epoch = 2
    objective.before_epoch(2, lambda: iter([batch]))
    assert objective.exported() is objective.frozen["encoder"]
    at_start = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    losses = [step(objective, batch, number, lr=1e-3) for number in range(2, 30)]
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == name.startswith("branch."), name
    for name, value in objective.exported().state_dict().items():
        assert torch.equal(value, at_start[name]), name
    assert losses[-1] < losses[0]
    assert "confidence_loss" in objective(batch).metrics


def test_confidence_follows_the_cosine() -> None:
    """Trained on frozen features, the mean resultant of kappa comes close to the cosines' mean."""
    from armillary.losses.von_mises_fisher import mean_resultant

    objective, batch = make(SphericalConfidenceObjective, frozen_share=1.0)
    objective.epoch = objective.second_stage
    with torch.no_grad():
        for label in range(tiny.NUM_CLASSES):  # rows near the features, so that cosines are high
            embeddings = objective.frozen["encoder"].eval()(batch.views[0][batch.label == label])
            objective.loss.weight[label] = embeddings.mean(0)
    optimizer = torch.optim.Adam(objective.branch.parameters(), lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        output = objective(batch)
        output.loss.backward()
        optimizer.step()
    cosine = output.metrics["target_cosine"]
    found = mean_resultant(tiny.EMBEDDING_DIM, output.metrics["kappa"])
    assert float(found) == pytest.approx(float(cosine), abs=0.02)


def test_broadface_queues_what_the_step_used() -> None:
    """Embeddings and rows from before the update, oldest out first, never more than the queue holds."""
    objective, batch = make(BroadFaceObjective, queue_size=18)
    dim = tiny.EMBEDDING_DIM
    rows_then = objective.loss.weight.detach().clone()
    step(objective, batch, 0)
    assert len(objective.queue) == 12
    torch.testing.assert_close(objective.queue.rows[:12, dim:], rows_then[batch.label])
    assert objective.queue.column("label")[:12].tolist() == batch.label.tolist()
    step(objective, batch, 1)
    assert len(objective.queue) == 18
    torch.testing.assert_close(objective.queue.rows[6:12, dim:], rows_then[batch.label[6:]])
    assert not torch.allclose(objective.queue.rows[:6, dim:], rows_then[batch.label[6:]])


def test_broadface_waits() -> None:
    objective, batch = make(BroadFaceObjective, start_epoch=1)
    step(objective, batch)
    assert len(objective.queue) == 0
    objective.epoch = 1
    step(objective, batch, 1)
    assert len(objective.queue) == 12


def test_qgface_contrasts_after_a_share_of_training() -> None:
    """Both views are queued from the start; the contrast comes later, and reads the queue."""
    objective, batch = make(QGFaceObjective, start_share=0.25, queue_size=20)
    assert "contrast" not in objective(batch).metrics
    step(objective, batch, 1)
    kept = batch.label.repeat_interleave(2)[-20:]
    assert objective.queue.column("label").sort().values.tolist() == kept.sort().values.tolist()
    objective.step = 4
    assert "contrast" not in objective(batch).metrics
    objective.step = 5  # of 20
    output = objective(batch)
    assert float(output.metrics["poor_share"]) == 1
    with torch.no_grad():
        objective.queue.rows[:] = torch.randn_like(objective.queue.rows)
    assert float(objective(batch).loss.detach()) != float(output.loss.detach())


def test_sets_split_into_clusters() -> None:
    """Every image gets a centre of its class; centres are the clusters' means, then move down their gradient."""
    objective, batch = make(SetDDC, subclusters=2, sets=2)
    objective.before_epoch(0, lambda: iter([batch]))
    assigned = objective.assigned[batch.index]
    assert bool((assigned >= 0).all())
    assert torch.equal(objective.classes[assigned], batch.label)
    place = torch.div(assigned, 2, rounding_mode="floor")
    assert torch.equal(place, batch.label * 2 + batch.fields["image_set"] % 2)
    objective.eval()
    features = objective.encoder(batch.views[0]).detach()
    for center in assigned.unique().tolist():
        mean = features[assigned == center].mean(0)
        torch.testing.assert_close(objective.centers[center], mean, rtol=1e-5, atol=1e-5)
    objective.train()
    before = objective.centers.clone()
    step(objective, batch)
    assert not torch.equal(objective.centers, before)
    objective.before_epoch(1, lambda: iter([batch]))
    assert torch.equal(objective.assigned[batch.index], assigned)


def test_centers_descend() -> None:
    """With the network held still, centres alone lower the loss."""
    objective, batch = make(SetDDC)
    losses = [step(objective, batch, number, lr=0.0) for number in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_accuracy_of_sets_is_that_of_the_nearest_center() -> None:
    """Centres on the sets' means find every set, centres of other classes none, absent centres not theirs."""
    objective, batch = make(SetDDC, subclusters=1, sets=5)
    objective.before_epoch(0, lambda: iter([batch]))
    objective.eval()  # with the statistics that the centres were found by
    assert float(objective(batch).metrics["accuracy"]) == 1
    right = objective.classes.clone()
    objective.classes.copy_(torch.where(right < 0, -1, (right + 1) % tiny.NUM_CLASSES))
    assert float(objective(batch).metrics["accuracy"]) == 0
    objective.classes.copy_(torch.where(right == 0, -1, right))
    assert float(objective(batch).metrics["accuracy"]) == 6 / 8  # two of the eight sets were of class 0


def test_accuracy_of_sets_in_the_surveys_formulation() -> None:
    """By hand: the nearest other set of each; a class with one set in the batch does not count."""
    directions = torch.tensor([[1.0, 0], [1, 0.05], [0, 1], [1, 0.2], [-1, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2])
    # The sets of class 0 find each other; of class 1 one finds the other, which finds class 0; class 2 has one set.
    assert float(neighbor_accuracy(directions, labels)) == pytest.approx(3 / 4)
    assert float(neighbor_accuracy(directions[:1], labels[:1])) == 0
    objective, batch = make(SetDDC, formulation="survey")
    assert 0 <= float(objective(batch).metrics["accuracy"]) <= 1
