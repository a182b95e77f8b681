"""Drawn positives, targets, dropout draws, masked faces and the self-paced memory inside their objectives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from armillary import losses
from armillary.losses.tensors import normalize
from armillary.objectives import Batch, get
from armillary.objectives.face_contrast import CoReFace, FocusFace
from armillary.objectives.labelled_queue import TSC, draw_of_class
from armillary.objectives.self_paced import SpCL
from armillary.testing import steps, tiny
from armillary.testing.steps import Case


def test_drawn_positives_are_of_the_class_and_even() -> None:
    label = torch.tensor([0, 0, 1, 0, 2, 0, 0, 1])
    wanted, hits = torch.tensor([0, 1, 2, 3]), torch.zeros(4, 9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(600):
        drawn = draw_of_class(wanted, label, torch.randperm(8, generator=draw), torch.rand(4, generator=draw), 2)
        assert (drawn >= 0).sum(dim=1).tolist() == [2, 2, 1, 0]
        assert ((drawn < 0) | (label[drawn] == wanted[:, None])).all()
        hits.scatter_add_(1, drawn % 9, torch.ones(4, 2))
    assert hits[:, :8].max() <= 600, "a column is drawn once at most"
    # Five keys of class 0, two drawn: each in two fifths of the draws.
    assert hits[0, :8][label == 0].tolist() == pytest.approx([240] * 5, abs=45)


def test_tsc_moves_means_and_assigns() -> None:
    case = Case(get("tsc"), {"assign_every": 1})
    objective = case.build()
    assert isinstance(objective, TSC)
    before = objective.means.clone()
    steps.train(objective, [case.batch(seed=seed) for seed in range(3)])
    assert sorted(objective.assignment.tolist()) == list(range(tiny.NUM_CLASSES))
    assert not torch.equal(objective.means, before)
    torch.testing.assert_close(objective.means.norm(dim=1), torch.ones(tiny.NUM_CLASSES))
    distance = torch.cdist(objective.means, objective.targets)
    chosen = distance[torch.arange(4), objective.assignment].sum()
    assert all(chosen <= distance[torch.arange(4), torch.randperm(4)].sum() + 1e-6 for _ in range(24))


def test_tsc_begins_as_kcl() -> None:
    late, plain = Case(get("tsc"), {"start_share": 1.0}), Case(get("kcl"))
    first, second = late.build(dtype=torch.float64), plain.build(dtype=torch.float64)
    second.load_state_dict({key: value for key, value in first.state_dict().items() if key in second.state_dict()})
    batch = late.batch(dtype=torch.float64)
    torch.testing.assert_close(first(batch).loss, second(batch).loss)


def test_coreface_keeps_its_margin_after_the_step() -> None:
    case = Case(get("coreface"))
    objective, batch = case.build(), case.batch()
    assert isinstance(objective, CoReFace)
    output = objective(batch)
    assert float(objective.contrast.margin) == 0
    objective.after_step(0)
    assert float(objective.contrast.margin) == pytest.approx(float(output.metrics["contrast_margin"]))


def test_coreface_warms_up_without_contrast() -> None:
    objective = Case(get("coreface"), {"start_share": 0.5}).build()
    batch = Case(get("coreface")).batch()
    assert "contrast_margin" not in objective(batch).metrics
    objective.epoch = 2
    assert "contrast_margin" in objective(batch).metrics


def test_focusface_is_its_equation() -> None:
    """The worked number: given logits, the constant log 2 for faces without a mask."""
    identity = [
        torch.tensor(rows, dtype=torch.float64)
        for rows in ([[2.0, 0.5, -1.0], [0.1, 1.2, 0.3]], [[1.5, 0.4, -0.2], [0.3, 0.9, 0.6]])
    ]
    label = torch.tensor([0, 1])
    objective = Case(get("focusface"), {"agreement_weight": 1 / 3}).build(dtype=torch.float64)
    assert isinstance(objective, FocusFace)
    calls = iter(identity)
    objective.loss.forward = lambda *_, **__: F.cross_entropy(next(calls), label)  # type: ignore[method-assign]
    logits = torch.tensor([[9.0, -9.0], [5.0, 5.0], [-0.4, 0.9], [0.2, 0.7]], dtype=torch.float64)
    objective.mask_head.forward = lambda _: logits  # type: ignore[method-assign]
    bare = torch.tensor([[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4]], dtype=torch.float64)
    masked = torch.tensor([[0.5, 0.6, -0.3], [0.2, 0.7, -0.4]], dtype=torch.float64)
    metrics: dict[str, torch.Tensor] = {}
    batch = Batch((bare, masked), torch.arange(2), {"label": label})
    value = objective._multi_task(torch.zeros(1, dtype=torch.float64), torch.cat([bare, masked]), batch, metrics)
    assert float(value) == pytest.approx(0.63562947, abs=1e-8)
    assert float(value) - 0.1 * math.log(2) / 2 == pytest.approx(0.60097211, abs=1e-8)
    assert float(metrics["agreement"]) == pytest.approx(0.22, abs=1e-9)


def test_focusface_of_identical_copies() -> None:
    objective = Case(get("focusface")).build(dtype=torch.float64).eval()
    whole = Case(get("focusface")).batch(dtype=torch.float64)
    same = Batch((whole.views[0], whole.views[0]), whole.index, whole.fields)
    assert float(objective(same).metrics["agreement"]) == 0


def test_spcl_updates_its_memory_as_the_paper_writes() -> None:
    case = Case(get("spcl"))
    objective, batch = case.build(), case.batch()
    assert isinstance(objective, SpCL)
    old, centres = objective.bank.rows.clone(), objective.centres.clone()
    with torch.no_grad():
        f = normalize(objective.encoder(batch.views[0]))
    objective(batch).loss.backward()
    assert torch.equal(objective.bank.rows, old)
    objective.after_step(0)
    source = batch.label < objective.classes
    assert source.any()
    assert not source.all()
    for row in range(len(f)):
        index = int(batch.index[row])
        expected = old[index] if source[row] else normalize(0.2 * old[index] + 0.8 * f[row])
        torch.testing.assert_close(objective.bank.rows[index], expected, atol=1e-5, rtol=0)
    for number in range(objective.classes):
        mean = f[batch.label == number].mean(0)
        expected = normalize(0.2 * centres[number] + 0.8 * mean)
        torch.testing.assert_close(objective.centres[number], expected, atol=1e-5, rtol=0)


def test_spcl_finds_the_people_it_is_not_told() -> None:
    """Well apart and without labels: every cluster is of one class, and there are some."""
    objective = tiny.build(get("spcl"), {"labelled_share": 0.0, "k1": 5, "k2": 2, "min_samples": 2})
    assert isinstance(objective, SpCL)
    batch = tiny.batch(objective.needs, 24, seed=1)
    patterns = torch.eye(tiny.EMBEDDING_DIM)[batch.label] + 0.05 * torch.rand(24, tiny.EMBEDDING_DIM)
    objective.encoder = Given(patterns)
    objective.before_epoch(0, lambda: iter([batch]))
    group = objective.group[:24]
    clusters = [number for number in group.unique() if (group == number).sum() > 1]
    assert clusters
    assert all(len(batch.label[group == number].unique()) == 1 for number in clusters)
    assert bool((objective.group[24:] == -1).all())


class Given(torch.nn.Module):
    """Answers what it was given."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.answer


def test_supcon_reads_labels_of_both_views() -> None:
    one = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 0, 2])
    inner = losses.SupCon(0.1, "in")(torch.cat([one, one]), label.repeat(2))
    outer = losses.SupCon(0.1, "out")(torch.cat([one, one]), label.repeat(2))
    assert float(inner) <= float(outer)
