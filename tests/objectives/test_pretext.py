"""Pretext tasks: worked numbers, rotations bit by bit, far-apart orders, triples in order in both directions."""

from __future__ import annotations

import math
from itertools import permutations as orders
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.data.views import make_views
from armillary.data.views.patches import permutations
from armillary.losses.pretext import WhichWasApplied
from armillary.objectives import get, hyperparameters
from armillary.spec.errors import UserError
from armillary.testing import tiny

FOUR_COPIES = [[2.0, 0.1, -0.3, 0.4], [0.0, 1.5, 0.2, -0.1], [0.3, -0.2, 0.9, 0.1], [-0.5, 0.2, 0.1, 1.1]]


def build(name: str, **options: Any) -> Any:
    return tiny.build(get(name), options)


@pytest.mark.parametrize(
    ("logits", "applied", "expected"),
    [
        (FOUR_COPIES, [0, 1, 2, 3], 0.60737367),
        ([[0.2, 1.0, -0.5]], [1], 0.51429507),
        ([[0.0] * 4], [2], math.log(4)),
        ([[7.0] * 100], [42], math.log(100)),
    ],
    ids=["rotation", "jigsaw", "uniform_4", "uniform_100"],
)
def test_worked_numbers(logits: list[list[float]], applied: list[int], expected: float) -> None:
    found = WhichWasApplied()(torch.tensor(logits, dtype=torch.float64), torch.tensor(applied))
    assert float(found) == pytest.approx(expected, abs=1e-8)


def turned_views(square: Tensor) -> list[Tensor]:
    make = make_views("rotation_all", {"flip": 0.0})
    return [make(square, torch.arange(len(square)), seed=0, epoch=0, view=view).pixels for view in range(4)]


def test_the_turns_are_counter_clockwise_and_exact() -> None:
    square = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)[None, None]
    views = [(view * 255).round().long()[0, 0].tolist() for view in turned_views(square)]
    assert views[0] == square[0, 0].tolist()
    assert views[1] == [[3, 6, 9], [2, 5, 8], [1, 4, 7]] == square[0, 0].T.flip(0).tolist()
    upright = torch.rand(2, 1, 6, 6)
    again = upright
    for _ in range(4):
        again = torch.rot90(again, 1, (2, 3))
    assert torch.equal(again, upright)


class Corner(nn.Module):
    """An encoder that looks into the four corners."""

    any_size = True

    def forward(self, images: Tensor) -> Tensor:
        corners = [images[:, 0, row, column] for row, column in ((0, 0), (0, -1), (-1, -1), (-1, 0))]
        return torch.stack(corners * 2, dim=1)


@pytest.mark.parametrize(("options", "views"), [({}, 4), ({"half_turns": True}, 3), ({"all_copies": False}, 1)])
def test_labels_are_the_turns(options: dict[str, Any], views: int) -> None:
    """Images whose one bright corner tells the turn: a classifier that reads it is always right."""
    rotation: Any = tiny.build(get("rotation"), options, encoder=Corner())
    needs = rotation.needs_for(rotation.hyperparameters)
    assert needs.views == views
    bright = torch.zeros(8, 1, 6, 6, dtype=torch.uint8)
    bright[:, :, 0, 0] = 255
    make = make_views(needs.recipe, {"flip": 0.0})
    made = [make(bright, torch.arange(8), seed=1, epoch=0, view=view) for view in range(views)]
    batch = tiny.batch(needs, 8)
    batch.views, batch.parameters = tuple(view.pixels for view in made), tuple(view.parameters for view in made)
    # Counter-clockwise: after one turn the corner is at the lower left, the fourth in the encoder's list.
    corner_of = {0: 0, 1: 3, 2: 2, 3: 1} if not rotation.hyperparameters.half_turns else {0: 0, 1: 2}
    with torch.no_grad():
        rotation.classifier.weight.zero_()
        for turn, corner in corner_of.items():
            rotation.classifier.weight[turn, corner] = 50.0
        output = rotation(batch)
    assert float(output.metrics["accuracy"]) == 1
    assert float(output.loss) < 1e-6


def test_a_constant_image_is_at_chance() -> None:
    rotation = build("rotation").eval()
    batch = tiny.batch(rotation.needs)
    batch.views = tuple(torch.full_like(view, 0.5) for view in batch.views)
    output = rotation(batch)
    assert float(output.metrics["accuracy"]) == pytest.approx(1 / 4)
    assert float(output.loss.detach()) >= math.log(4)


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(UserError, match="drawn from four rotations"):
        hyperparameters("rotation", {"half_turns": True, "all_copies": False})
    with pytest.raises(UserError, match="four tiles have 24 orders"):
        hyperparameters("jigsaw", {"tiles": 2, "permutations": 25})


def distance(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("count", [3, 8, 24])
def test_orders_are_chosen_greedily(count: int) -> None:
    """Each new order has the largest summed Hamming distance to those before it that any order has."""
    chosen = [tuple(row) for row in permutations(2, count).tolist()]
    assert len(set(chosen)) == count
    for number in range(1, count):
        before = chosen[:number]
        best = max(sum(distance(order, other) for other in before) for order in orders(range(4)) if order not in before)
        assert sum(distance(chosen[number], other) for other in before) == best


def test_orders_of_nine_tiles_are_far_apart() -> None:
    chosen = permutations(3, 64)
    apart = (chosen[:, None] != chosen[None]).sum(2) + 9 * torch.eye(64, dtype=torch.long)
    assert int(apart.min()) >= 2


def test_tiles_are_seen_one_by_one() -> None:
    """The n-th tile is the n-th square of the puzzle, standardised; another order permutes the tiles, nothing else."""
    jigsaw = build("jigsaw")
    puzzle = torch.rand(2, 1, 6, 6)
    tiles = jigsaw.tiles_of(puzzle)
    assert tiles.shape == (18, 1, 2, 2)
    cut = puzzle[1, :, 2:4, 4:6]
    expected = 0.5 + 0.25 * (cut - cut.mean()) / (cut.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(tiles[9 + 5], expected)
    moved = puzzle.clone()
    moved[:, :, :2, :2], moved[:, :, 4:, 4:] = puzzle[:, :, 4:, 4:], puzzle[:, :, :2, :2]
    again = jigsaw.tiles_of(moved)
    torch.testing.assert_close(again[[0, 8]], tiles[[8, 0]])
    torch.testing.assert_close(again[1:8], tiles[1:8])


def test_an_encoder_for_whole_images_is_refused() -> None:
    flat = tiny.TinyEncoder()
    flat.any_size = False
    for name in ("jigsaw", "cpc"):
        with pytest.raises(UserError, match="takes one size only"):
            tiny.build(get(name), encoder=flat)


@pytest.mark.parametrize("length", [5, 9])
def test_triples_are_in_order_in_both_directions(length: int) -> None:
    objective = tiny.build(get("frame_order"), {"window": length})
    frames, in_order = objective.triples(torch.arange(4000))  # type: ignore[operator]
    first, middle, last = frames.unbind(1)
    between = (middle > torch.minimum(first, last)) & (middle < torch.maximum(first, last))
    assert torch.equal(between, in_order.bool())
    assert float(in_order.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float((first < last).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert frames.min() == 0
    assert frames.max() == length - 1
    # Outer frames are the same kind of pair in both cases: the middle alone decides.
    if length == 5:
        assert {tuple(sorted(pair)) for pair in zip(first.tolist(), last.tolist(), strict=True)} == {(1, 3)}
