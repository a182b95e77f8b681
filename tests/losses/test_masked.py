"""Errors of hidden patches: worked numbers, loops, what must not change them; the masked objectives around them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.losses.masked import MaskedPatches
from armillary.objectives import Objective, get
from armillary.spec.errors import UserError
from armillary.testing import tiny
from armillary.testing.gloo_pool import shared_pool

TARGET = [[0.1, 0.9, 0.4, 0.6], [0.2, 0.2, 0.8, 0.4], [1.0, 0.0, 0.5, 0.5], [0.3, 0.7, 0.1, 0.9]]
PREDICTED = [[0.0, 0.8, 0.5, 0.5], [0.3, 0.1, 0.9, 0.3], [0.7, 0.2, 0.4, 0.6], [0.2, 0.6, 0.2, 0.7]]
HIDDEN = [True, False, True, True]


def worked() -> tuple[Tensor, Tensor, Tensor]:
    predicted, target = (torch.tensor([rows], dtype=torch.float64) for rows in (PREDICTED, TARGET))
    return predicted, target, torch.tensor([HIDDEN])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (MaskedPatches(), 0.02166667),
        (MaskedPatches(norm_pix=True), 0.62170829),
        (MaskedPatches(patches="all"), 0.075),
        (MaskedPatches(patches="summed"), 4 * 0.02166667),
    ],
    ids=["raw", "norm_pix", "survey", "summed"],
)
def test_worked_numbers(loss: MaskedPatches, expected: float) -> None:
    assert float(loss(*worked())) == pytest.approx(expected, abs=2e-8)


def noise(images: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(images, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    return predicted, target, torch.rand(images, 5, generator=draw) < 0.6


def slow(predicted: Tensor, target: Tensor, hidden: Tensor) -> float:
    """The paper's loss with standardised patches, by loops."""
    total, count = 0.0, 0
    for n in range(hidden.shape[0]):
        for i in range(hidden.shape[1]):
            if hidden[n, i]:
                x = [float(value) for value in target[n, i]]
                mean = sum(x) / len(x)
                variance = sum((value - mean) ** 2 for value in x) / (len(x) - 1)
                wanted = [(value - mean) / math.sqrt(variance + 1e-6) for value in x]
                total += sum((float(predicted[n, i, d]) - wanted[d]) ** 2 for d in range(len(x))) / len(x)
                count += 1
    return total / count


def test_it_is_its_equation() -> None:
    assert float(MaskedPatches(norm_pix=True)(*noise())) == pytest.approx(slow(*noise()), rel=1e-12)


def test_what_is_seen_does_not_matter() -> None:
    predicted, target, hidden = noise()
    changed = torch.where(hidden[..., None], predicted, torch.nan)
    for loss in (MaskedPatches(True), MaskedPatches(patches="summed")):
        assert float(loss(changed, target, hidden)) == float(loss(predicted, target, hidden))


def test_contrast_of_standardised_patches_does_not_matter() -> None:
    predicted, target, hidden = noise()
    loss = MaskedPatches(norm_pix=True)
    torch.testing.assert_close(
        loss(predicted, 3 * target + 2, hidden), loss(predicted, target, hidden), rtol=1e-5, atol=0
    )


def test_flat_patches_and_nothing_hidden() -> None:
    predicted, target, hidden = noise()
    assert torch.equal(MaskedPatches().standardised(torch.ones(1, 2, 4)), torch.zeros(1, 2, 4))
    assert float(MaskedPatches()(predicted, target, hidden & False)) == 0
    with pytest.raises(ValueError, match="do not belong together"):
        MaskedPatches()(predicted, target[:, :4], hidden)


def part(rank_of: int) -> float:
    from armillary import collectives

    mine = slice(collectives.rank() * rank_of, (collectives.rank() + 1) * rank_of)
    return float(MaskedPatches()(*(item[mine] for item in noise())))


@pytest.mark.xdist_group("gloo")
def test_two_workers_with_unequal_masks() -> None:
    _, _, hidden = noise()
    assert hidden[:3].sum() != hidden[3:].sum()
    both = shared_pool().run(part, 3)
    assert sum(both) / 2 == pytest.approx(float(MaskedPatches()(*noise())), rel=1e-12)


def built(name: str, **options: Any) -> tuple[Objective, Tensor, Tensor]:
    objective = tiny.build(get(name), options).eval()
    batch = tiny.batch(objective.needs, 5)
    return objective, batch.views[0], batch.index


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 2), (0.5, 4), (0.3, 6)])
def test_the_encoder_sees_only_what_is_left(ratio: float, kept: int) -> None:
    """Of nine patches floor(9 (1 - r)) stay, and pixels of the others change no prediction."""
    mae, images, index = built("mae", mask_ratio=ratio)
    predicted, hidden = mae.reconstruct(images, index)  # type: ignore[operator]
    assert hidden.sum(1).tolist() == [9 - kept] * 5
    blot = torch.nn.functional.interpolate(hidden.view(5, 1, 3, 3).float(), scale_factor=tiny.PATCH)
    again, _ = mae.reconstruct(images + blot, index)  # type: ignore[operator]
    torch.testing.assert_close(again, predicted)


def test_masks_follow_step_and_index_alone() -> None:
    mae, images, index = built("mae")
    _, hidden = mae.reconstruct(images, index)  # type: ignore[operator]
    _, backwards = mae.reconstruct(images.flip(0), index.flip(0))  # type: ignore[operator]
    assert torch.equal(backwards.flip(0), hidden)
    mae.step = 1
    assert not torch.equal(mae.reconstruct(images, index)[1], hidden)  # type: ignore[operator]


def test_pictures_show_the_seen_patches_as_they_are() -> None:
    mae, images, _ = built("mae")
    grid = mae.pictures(images)["reconstruction"]
    assert grid.shape == (5, 3, 1, 6, 6)
    torch.testing.assert_close(grid[:, 0], images)
    same = (grid[:, 2] - images).abs() < 1e-6
    assert float(same.float().mean()) >= 2 / 9


def test_maskfeat_looks_at_hidden_patches_through_a_token() -> None:
    maskfeat, images, index = built("maskfeat", mask_ratio=0.5)
    batch = tiny.batch(maskfeat.needs, 5)
    output = maskfeat(batch)
    assert maskfeat.target(images).shape == (5, 9, 9)  # type: ignore[operator]
    assert float(output.metrics["hidden_square"]) <= 1 / 9 + 1e-6
    assert index.tolist() == list(range(5))


def test_cells_must_divide_patches() -> None:
    with pytest.raises(UserError, match=r"objective.cell: cells of 4 px do not divide patches of 2 x 2 px"):
        tiny.build(get("maskfeat"), {"cell": 4})


def test_a_decoder_that_heads_do_not_divide() -> None:
    from armillary.objectives import hyperparameters

    with pytest.raises(UserError, match="decoder_dim 90 must be a multiple"):
        hyperparameters("mae", {"decoder_dim": 90})
