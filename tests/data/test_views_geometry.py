"""Where views look: boxes, mirror images, rotations, turns, resampling, puzzles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor

from armillary.components.counter import key, sample_keys
from armillary.data.views import Recipe, View, Views, make_views
from armillary.data.views.geometry import draw, filter_matrix, separable
from armillary.data.views.patches import permutations

INDEX = torch.arange(12)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(12, 3, 6, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(28, 24), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def view_of(images: Tensor, recipe: Recipe | str, index: Tensor = INDEX, view: int = 0) -> View:
    views = make_views(recipe, {}) if isinstance(recipe, str) else Views(recipe, "test")
    return views(images, index, seed=0, epoch=0, view=view)


def ramps(count: int, size: int) -> Tensor:
    """Images whose first channel is x and whose second is y, as shares of the side."""
    line = ((torch.arange(size) + 0.5) / size * 255).round().to(torch.uint8)
    x, y = line.expand(size, size), line[:, None].expand(size, size)
    return torch.stack([x, y, x]).expand(count, -1, -1, -1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1.0, 96, 240])
def test_pixels_show_what_the_box_says(size: float, interpolation: str) -> None:
    index = torch.arange(40)
    recipe = Recipe(flip=0.5, crop_scale=(0.2, 0.8), crop_ratio=(0.5, 2), size=size, interpolation=interpolation)
    shown = view_of(ramps(40, 200), recipe, index)
    side = 200 if size == 1 else int(size)
    assert shown.pixels.shape == (40, 3, side, side)
    x0, y0, x1, y1 = shown.parameters["box"].unbind(1)
    left, right = torch.where(shown.parameters["flip"] > 0, x1, x0), torch.where(shown.parameters["flip"] > 0, x0, x1)
    at = (torch.arange(side) + 0.5) / side
    expected_x = left[:, None] + (right - left)[:, None] * at
    expected_y = y0[:, None] + (y1 - y0)[:, None] * at
    # The ramp is stored in steps of 1/255; at the edge of the image it has no next value.
    inner = slice(3, -3)
    torch.testing.assert_close(shown.pixels[:, 0, side // 2, inner], expected_x[:, inner], rtol=0, atol=0.006)
    torch.testing.assert_close(shown.pixels[:, 1, inner, side // 2], expected_y[:, inner], rtol=0, atol=0.006)


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    side = 5000
    image = torch.empty(1, 1, 1).expand(3, side, side)
    scale, ratio = (0.3, 1.0), (1 / 2, 2.0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(1000)]) / side
    recipe = Recipe(crop_scale=scale, crop_ratio=ratio)
    x0, y0, x1, y1 = draw(recipe, sample_keys(key(9), torch.arange(20_000)))["box"].T.double().numpy()
    for own, other in ((y0, theirs[:, 0]), (x0, theirs[:, 1]), (y1 - y0, theirs[:, 2]), (x1 - x0, theirs[:, 3])):
        assert stats.ks_2samp(own, other).pvalue > 1e-4
    assert min(x0.min(), y0.min()) >= -1e-6
    assert max(x1.max(), y1.max()) <= 1 + 1e-6


def test_a_crop_that_cannot_fit_is_the_largest_of_its_ratio() -> None:
    box = draw(Recipe(crop_ratio=(2.0, 3.0)), sample_keys(key(9), torch.arange(50)))["box"]
    torch.testing.assert_close(box, torch.tensor([0.0, 0.25, 1.0, 0.75]).expand(50, 4))


RANGES = [
    ("rotation", Recipe(rotation=20.0), -20, 20),
    ("zoom", Recipe(zoom=0.2), 0.8, 1.2),
    ("shift_x", Recipe(shift=0.1), -0.1, 0.1),
    ("shift_y", Recipe(shift=0.1), -0.1, 0.1),
]


@pytest.mark.parametrize(("name", "recipe", "low", "high"), RANGES)
def test_geometry_has_the_stated_distribution(name: str, recipe: Recipe, low: float, high: float) -> None:
    drawn = draw(recipe, sample_keys(key(4), torch.arange(20_000)))
    x0, y0, x1, y1 = drawn["box"].double().unbind(1)
    values = {
        "rotation": drawn["rotation"].double(),
        "zoom": 1 / (x1 - x0),
        "shift_x": (x0 + x1 - 1) / 2,
        "shift_y": (y0 + y1 - 1) / 2,
    }[name]
    assert stats.kstest(values.numpy(), "uniform", args=(low, high - low)).pvalue > 1e-5


def test_flip_is_a_mirror(images: Tensor) -> None:
    for recipe in (Recipe(flip=1.0), Recipe(flip=1.0, interpolation="bicubic")):
        torch.testing.assert_close(view_of(images, recipe).pixels, images.flip(3) / 255, rtol=0, atol=1e-5)
    flips = view_of(images.repeat(400, 1, 1, 1), Recipe(flip=0.3), torch.arange(4800)).parameters["flip"]
    assert stats.binomtest(int(flips.sum()), 4800, 0.3).pvalue > 1e-5


@pytest.mark.parametrize(("height", "width"), [(40, 40), (48, 32)])
def test_rotation_keeps_shapes_round(height: int, width: int) -> None:
    # A dot beside the centre moves on a circle, in pixels, whatever the image's proportions.
    yy, xx = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    dot = torch.exp(-((xx - width / 2 - 9) ** 2 + (yy - height / 2) ** 2) / 8)
    images = (dot * 255).to(torch.uint8).expand(50, 1, height, width)
    shown = view_of(images, Recipe(rotation=180), torch.arange(50))
    turned = shown.pixels[:, 0]
    mass = turned.sum(dim=(1, 2))
    x = (turned * xx).sum(dim=(1, 2)) / mass - width / 2
    y = (turned * yy).sum(dim=(1, 2)) / mass - height / 2
    torch.testing.assert_close((x**2 + y**2).sqrt(), torch.full((50,), 9.0), rtol=0, atol=0.15)
    difference = torch.rad2deg(torch.atan2(y, x)) + shown.parameters["rotation"]
    assert ((difference + 180) % 360 - 180).abs().max() < 1.0


@pytest.mark.parametrize(("size_in", "size_out"), [(64, 24), (64, 64), (30, 71), (9, 2)])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_resampling_is_pillows(size_in: int, size_out: int, kind: str) -> None:
    values = np.random.default_rng(0).random((size_in, size_in)).astype(np.float32)
    expected = Image.fromarray(values).resize((size_out, size_out), Image.Resampling[kind.upper()])
    zero, one = torch.zeros(1), torch.ones(1)
    matrix = filter_matrix(zero, one, size_in, size_out, kind)
    made = separable(torch.from_numpy(values)[None, None], matrix, matrix)[0, 0]
    torch.testing.assert_close(made, torch.from_numpy(np.array(expected)), rtol=0, atol=2e-5)


def test_smaller_views_do_not_alias() -> None:
    # Lines one pixel wide average out to gray; plain bilinear sampling would show moire.
    stripes = (torch.arange(96) % 2 * 255).to(torch.uint8).expand(4, 3, 96, 96)
    small = view_of(stripes, Recipe(size=20, crop_scale=(0.7, 1.0)), torch.arange(4)).pixels
    assert (small - 0.5).abs().max() < 0.12


def test_turns_are_quarter_turns_and_their_class_is_told(images: Tensor) -> None:
    square, index = images[:, :, 2:26].repeat(10, 1, 1, 1), torch.arange(120)
    shown = view_of(square, Recipe(turns="random"), index)
    classes = shown.parameters["rotation_class"]
    assert classes.dtype == torch.int64
    assert sorted(classes.unique().tolist()) == [0, 1, 2, 3]
    for at, turns in enumerate(classes.tolist()):
        expected = torch.rot90(square[at] / 255, turns, (1, 2))
        torch.testing.assert_close(shown.pixels[at], expected, rtol=0, atol=1e-6)
    counts = torch.bincount(
        view_of(square[:1].expand(4000, -1, -1, -1), "rotation", torch.arange(4000)).parameters["rotation_class"]
    )
    assert stats.chisquare(counts.numpy()).pvalue > 1e-5


def test_all_turns_show_one_picture(images: Tensor) -> None:
    views = [view_of(images, "rotation_all", view=view) for view in range(4)]
    # Oblong images are cut to their square first, in which a turn leaves no trace.
    assert views[0].pixels.shape[2:] == (24, 24)
    for turns, shown in enumerate(views):
        assert (shown.parameters["rotation_class"] == turns).all()
        assert torch.equal(torch.rot90(shown.pixels, -turns, (2, 3)), views[0].pixels)
    x0, y0, x1, y1 = views[0].parameters["box"][0].tolist()
    assert (x0, x1) == (0, 1)
    assert (y0, y1) == pytest.approx((2 / 28, 26 / 28))


@pytest.mark.parametrize(("tiles", "count"), [(2, 24), (3, 100), (4, 20)])
def test_orders_of_tiles_are_far_apart(tiles: int, count: int) -> None:
    orders = permutations(tiles, count)
    number = tiles * tiles
    assert torch.equal(orders.sort(dim=1).values, torch.arange(number).expand(count, number))
    distance = (orders[:, None] != orders[None]).sum(dim=2)
    off_diagonal = distance[~torch.eye(count, dtype=torch.bool)]
    assert off_diagonal.min() >= 2
    # Random orders agree in one place on average.
    assert off_diagonal.float().mean() > number - 1.0 - (1.0 if tiles == 2 else 0.0)


def test_first_nine_orders_differ_everywhere() -> None:
    orders = permutations(3, 9)
    assert ((orders[:, None] != orders[None]).sum(dim=2) + 9 * torch.eye(9, dtype=torch.int64) == 9).all()


@pytest.mark.parametrize(("tiles", "shape"), [(3, (30, 48)), (2, (33, 21)), (4, (64, 64))])
def test_a_puzzle_can_be_solved(tiles: int, shape: tuple[int, int]) -> None:
    # Every pixel's value names its cell.
    height, width = shape
    cells = (torch.arange(height) // (height // tiles)).clamp(max=tiles - 1)[:, None] * tiles
    cells = cells + (torch.arange(width) // (width // tiles)).clamp(max=tiles - 1)
    images = (cells * 10).to(torch.uint8).expand(8, 3, height, width)
    recipe = Recipe(tiles=tiles, permutations=20, tile_ratio=0.8)
    shown = view_of(images, recipe, torch.arange(8))
    side = (round(height // tiles * 0.8), round(width // tiles * 0.8))
    assert shown.pixels.shape == (8, 3, side[0] * tiles, side[1] * tiles)
    pieces = shown.pixels.unflatten(2, (tiles, side[0])).unflatten(4, (tiles, side[1]))
    pieces = pieces.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = permutations(tiles, 20)[shown.parameters["permutation"]]
    torch.testing.assert_close(pieces, (order * 10 / 255)[..., None, None, None].expand_as(pieces))
    solved = pieces.gather(1, order.argsort(dim=1)[..., None, None, None].expand_as(pieces))
    expected = torch.arange(tiles * tiles) * 10 / 255
    torch.testing.assert_close(solved[:, :, 0, 0, 0], expected.expand(8, -1))


def test_tiles_are_cut_at_random_places_of_their_cells() -> None:
    position = torch.arange(30).to(torch.uint8).expand(200, 1, 30, 30)
    shown = view_of(position, Recipe(tiles=3, tile_ratio=0.8), torch.arange(200))
    first = (shown.pixels[:, 0, 0, ::8] * 255).round().long()
    # Cells are 10 pixels wide, tiles 8: offsets 0, 1 and 2 within a cell.
    assert sorted((first % 10).unique().tolist()) == [0, 1, 2]
    assert math.isclose(float((first % 10).float().mean()), 1.0, abs_tol=0.12)
