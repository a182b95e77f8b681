"""DeepID, DeepID2, DeepID2+ and their kin: which layer sees which stage, which term trains which part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.objectives import Batch, Objective
from armillary.objectives.softmax_terms import CenterLossObjective, DeepID, DeepID2, DeepID2Plus, RingLossObjective
from armillary.spec.errors import UserError
from armillary.testing import tiny


def make(cls: type[Objective], **options: Any) -> tuple[Any, Batch]:
    objective = tiny.build(cls, options, dtype=torch.float64)
    return objective, tiny.batch(cls.needs_for(objective.hyperparameters), dtype=torch.float64)


class Fixed(torch.nn.Module):
    """Stages and embedding as they are set."""

    def __init__(self, maps: tuple[Tensor, ...], embedding: Tensor) -> None:
        super().__init__()
        self.maps, self.embedding = maps, embedding
        self.stage_channels = tuple(each.shape[1] for each in maps)

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        del images
        return self.maps

    def embed_map(self, last_map: Tensor) -> Tensor:
        del last_map
        return self.embedding


def numbers(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def hidden_of(objective: Any, batch: Batch) -> Tensor:
    """What DeepID's classifier is given."""
    seen: list[Tensor] = []
    handle = objective.loss.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective(batch)
    handle.remove()
    return seen[0]


def test_deepid_hidden_layer_is_the_catalogs() -> None:
    """h = max(0, A u3 + B u4 + c); the embedding stands for B u4 + c."""
    objective, batch = make(DeepID)
    fourth = 0.5 * numbers([0.5, -1.0]) + numbers([0.05, 0.1])
    objective.encoder = Fixed((numbers([1.0, 2.0])[..., None, None], torch.zeros(1, 1, 1, 1)), fourth)
    objective.bypass = torch.nn.Linear(2, 2, bias=False).double()
    objective.loss = losses.Softmax(tiny.NUM_CLASSES, 2).double()
    with torch.no_grad():
        objective.bypass.weight.copy_(numbers([0.2, 0.1], [-0.4, 0.3]))
    hidden = hidden_of(objective, batch.rows(slice(0, 1)))
    torch.testing.assert_close(hidden, numbers([0.7, 0.0]))
    objective.bypass.weight.data.zero_()
    torch.testing.assert_close(hidden_of(objective, batch.rows(slice(0, 1))), fourth.clamp_min(0))


def test_deepid_is_softmax_over_what_it_hides() -> None:
    objective, batch = make(DeepID)
    hidden = hidden_of(objective, batch)
    assert (hidden >= 0).all()
    assert (hidden == 0).any()
    torch.testing.assert_close(objective(batch).loss, objective.loss(hidden, batch.label))
    without, _ = make(DeepID, bypass=False)
    torch.testing.assert_close(hidden_of(without, batch), torch.relu(without.encoder(batch.views[0])))


def test_weights_of_zero_leave_softmax() -> None:
    for cls in (DeepID2, CenterLossObjective, RingLossObjective):
        objective, batch = make(cls, weight=0.0)
        expected = objective.loss(objective.encoder(batch.views[0]), batch.label)
        torch.testing.assert_close(objective(batch).loss, expected)


def test_deepid2_total_is_the_catalogs() -> None:
    """Identification 2.54375693, and of verification the mean of a pair together (2.5) and one apart (2.86669235)."""
    objective, batch = make(DeepID2, margin=6.0, margin_pairs=0)
    torch.testing.assert_close(objective(batch).loss, expected_of(objective, batch, objective.loss, objective.pairs))
    assert pytest.approx(2.67792424, abs=1e-8) == 2.54375693 + 0.05 * (2.5 + 2.86669235) / 2
    pair = objective.pairs
    together, apart = (pair.pair_losses(numbers([distance]), torch.tensor([[same]])) for distance, same in PAIRS)
    assert float(together) == pytest.approx(2.5)
    assert float(apart) == pytest.approx(2.86669235)


PAIRS = ((5**0.5, True), (13**0.5, False))


def expected_of(objective: Any, batch: Batch, head: Any, pairs: Any, feature: Tensor | None = None) -> Tensor:
    """Ident + lambda Verif of a feature, the embedding by default."""
    feature = objective.encoder(batch.views[0]) if feature is None else feature
    total: Tensor = head(feature, batch.label) + objective.hyperparameters.weight * pairs(feature, batch.label)
    return total


def test_deepid2_plus_is_the_sum_over_its_stages() -> None:
    objective, batch = make(DeepID2Plus, branch_dim=5, stage_weight=0.5)
    maps = objective.encoder.stages(batch.views[0])
    early = objective.branches[0](maps[0].mean(dim=(2, 3)))
    stages = [
        expected_of(objective, batch, head, pairs, feature)
        for head, pairs, feature in zip(
            objective.heads, objective.pairs, (early, objective.encoder.embed_map(maps[1])), strict=True
        )
    ]
    output = objective(batch)
    torch.testing.assert_close(output.loss, 0.5 * stages[0] + stages[1])
    torch.testing.assert_close(output.metrics["stage1_loss"], stages[0].detach())
    survey, _ = make(DeepID2Plus, branch_dim=5, formulation="survey")
    survey.load_state_dict(objective.state_dict())
    softmax = objective.heads[0](early, batch.label)
    torch.testing.assert_close(survey(batch).loss, softmax + stages[1])


def test_deepid2_plus_without_earlier_stages_is_deepid2() -> None:
    plus, batch = make(DeepID2Plus, stage_weight=0.0)
    plain, _ = make(DeepID2)
    plain.encoder.load_state_dict(plus.encoder.state_dict())
    plain.loss.load_state_dict(plus.heads[-1].state_dict())
    torch.testing.assert_close(plus(batch).loss, plain(batch).loss)


def test_a_stages_head_learns_from_its_stage_alone() -> None:
    """The gradient of one stage's loss reaches that stage's head and branch and no other's."""
    objective, batch = make(DeepID2Plus)
    maps = objective.encoder.stages(batch.views[0])
    early = objective.branches[0](maps[0].mean(dim=(2, 3)))
    expected = torch.autograd.grad(objective.heads[0](early, batch.label), objective.heads[0].weight)[0]
    objective(batch).loss.backward()
    torch.testing.assert_close(objective.heads[0].weight.grad, expected)
    # The second stage's layers feel the last stage's loss alone.
    objective.zero_grad()
    objective.hyperparameters = objective.hyperparameters.model_copy(update={"stage_weight": 0.0})
    objective(batch).loss.backward()
    assert objective.branches[0].weight.grad.abs().max() == 0
    assert objective.heads[1].weight.grad.abs().max() > 0


class Stages(tiny.TinyEncoder):
    """With a third stage."""

    stage_channels = (6, 12, 12)

    def stages(self, images: Tensor) -> tuple[Tensor, ...]:
        shallow, deep = super().stages(images)
        return shallow, deep, deep.tanh()


@pytest.mark.parametrize(("stages", "early"), [([], [1, 2]), ([2], [2]), ([2, 1], [1, 2])])
def test_stages_are_chosen_by_number(stages: list[int], early: list[int]) -> None:
    objective = tiny.build(DeepID2Plus, {"stages": stages}, encoder=Stages())
    metrics = objective(tiny.batch(DeepID2Plus.needs)).metrics
    assert sorted(name for name in metrics if name.startswith("stage")) == [f"stage{n}_loss" for n in [*early, 3]]


@pytest.mark.parametrize(("stages", "says"), [([3], "no earlier stage 3"), ([0], "stage 0"), ([1, 1], "twice")])
def test_stages_that_are_not_there_are_named(stages: list[int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny.build(DeepID2Plus, {"stages": stages}, encoder=Stages())
