"""mixup and i-Mix: what they compute around other objectives, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from armillary.components.mixing import beta_share, mixed, of_partners, partners
from armillary.losses.info_nce import InfoNCE
from armillary.objectives import get, hyperparameters
from armillary.objectives.wrappers import Mixing
from armillary.spec.errors import UserError
from armillary.testing import tiny
from armillary.testing.steps import Case

A = [[0.9, 0.1, -0.2], [-0.3, 0.8, 0.4], [0.2, -0.6, 0.7], [-0.7, -0.2, -0.5]]
B = [[0.5, 0.6, -0.3], [0.2, 0.7, -0.4], [-0.3, -0.5, 0.6], [-0.6, 0.3, -0.2]]
PARTNER = torch.tensor([2, 3, 0, 1])


def test_worked_numbers() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 1.2, 0.3], [-0.5, 0.4, 0.9], [1.1, -0.3, 0.2]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    loss = 0.3 * F.cross_entropy(logits, labels) + 0.7 * F.cross_entropy(logits, of_partners(labels, PARTNER))
    assert float(loss) == pytest.approx(1.68611059, abs=1e-8)
    one, two = torch.tensor(A, dtype=torch.float64), torch.tensor(B, dtype=torch.float64)
    assert mixed(one, PARTNER, 0.3)[0].tolist() == pytest.approx([0.41, -0.39, 0.43])
    nce = InfoNCE(0.2)
    assert float(0.7 * nce(one, two) + 0.3 * nce(one, of_partners(two, PARTNER))) == pytest.approx(1.6498485, abs=1e-8)


def test_shares_follow_beta() -> None:
    for alpha in (0.2, 1.0, 4.0):
        drawn = torch.tensor([beta_share(alpha, 0, step) for step in range(2000)]).double()
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.012)
    assert beta_share(0, 1) == 1
    assert beta_share(0.2, 3) == beta_share(0.2, 3)


def test_partners_are_a_ring_of_indices() -> None:
    index = torch.tensor([7, 3, 11, 20, 5])
    partner = partners(index, 0, 1)
    assert sorted(partner.tolist()) == [0, 1, 2, 3, 4]
    assert not (partner == torch.arange(5)).any()
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(index[order][partners(index[order], 0, 1)], index[partner][order])
    assert not all(torch.equal(partners(index, 0, step), partner) for step in range(2, 6))


@pytest.mark.parametrize("inner", ["softmax", "arcface", "supcon", "triplet"])
def test_mixup_is_its_equation(inner: str) -> None:
    small = {} if inner != "supcon" else {"projection_hidden": 16, "projection_dim": 8}
    case = Case(get("mixup"), {"of": {"name": inner, **small}, "alpha": 1.0})
    objective, batch = case.build(dtype=torch.float64).eval(), case.batch(dtype=torch.float64)
    assert isinstance(objective, Mixing)
    output = objective(batch)
    share, partner = objective.share(), partners(batch.index, 97, 0, 0)
    views = tuple(mixed(view, partner, share) for view in batch.views)
    own = objective.of(type(batch)(views, batch.index, batch.fields)).loss
    others = objective.of(type(batch)(views, batch.index, {"label": batch.label[partner]})).loss
    torch.testing.assert_close(output.loss, share * own + (1 - share) * others)
    assert float(output.metrics["mix"]) == pytest.approx(share)


def test_images_are_embedded_once() -> None:
    objective, calls = Case(get("mixup"), {"alpha": 1.0}).build(), []
    objective.encoder.register_forward_hook(lambda *_: calls.append(1))
    batch = Case(get("mixup")).batch()
    objective(batch).loss.backward()
    assert len(calls) == 1
    objective(batch)
    assert len(calls) == 2
    assert objective.exported() is objective.encoder


def test_nothing_mixed_is_the_objective_itself() -> None:
    objective = Case(get("mixup"), {"alpha": 0.0, "of": {"name": "arcface"}}).build()
    assert isinstance(objective, Mixing)
    batch = Case(get("mixup")).batch()
    torch.testing.assert_close(objective(batch).loss, objective.of(batch).loss)


def test_i_mix_keeps_the_larger_share() -> None:
    objective = Case(get("i_mix")).build()
    assert isinstance(objective, Mixing)
    for step in range(20):
        objective.step = step
        assert objective.share() >= 0.5


@pytest.mark.parametrize("inner", ["byol", "simclr", "barlow_twins"])
def test_i_mix_around_others(inner: str) -> None:
    of = {
        "name": inner,
        **{key: value for key, value in tiny.SMALL.items() if key in get(inner).Hyperparameters.model_fields},
    }
    case = Case(get("i_mix"), {"of": of})
    objective = case.build()
    objective(case.batch()).loss.backward()
    objective.after_step(0)
    assert any(parameter.grad is not None for parameter in objective.encoder.parameters())


@pytest.mark.parametrize(
    ("wrapper", "of", "says"),
    [
        ("mixup", {}, r"objective\.of\.name"),
        ("mixup", {"name": "arcfase"}, "unknown objective 'arcfase'"),
        ("mixup", {"name": "arcface", "margin": 9}, r"objective\.of\.margin"),
        ("mixup", {"name": "mixup"}, "is a wrapper itself"),
        ("mixup", {"name": "simclr"}, "has no labels to mix"),
        ("i_mix", {"name": "arcface"}, "does not compare two views"),
        ("i_mix", {"name": "moco_v2"}, "writes its queue"),
    ],
)
def test_mistakes_are_named(wrapper: str, of: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        get(wrapper).needs_for(hyperparameters(wrapper, {"of": of}))
