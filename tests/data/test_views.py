"""Views: a function of (seed, epoch, sample, view) alone; recipes as a job names and changes them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from armillary.data.views import RECIPES, Views, make_views
from armillary.spec.errors import UserError

INDEX = torch.tensor([7, 3, 10**9, 0, 11, 5, 2, 2**40, 9, 1, 8, 4])
# A recipe is tried with the view that differs most from the first.
LAST_VIEW = {name: len(recipes) - 1 for name, recipes in RECIPES.items()}


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(12, 3, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(29, 24), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def pixels(
    views: Views, images: Tensor, index: Tensor = INDEX, *, seed: int = 1, epoch: int = 2, view: int = 0
) -> Tensor:
    return views(images, index, seed=seed, epoch=epoch, view=view).pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_view_does_not_depend_on_its_batch(images: Tensor, recipe: str, channels: int) -> None:
    views, images, view = make_views(recipe, {}), images[:, :channels], LAST_VIEW[recipe]
    whole = views(images, INDEX, seed=1, epoch=2, view=view)
    assert whole.pixels.shape[:2] == images.shape[:2]
    assert whole.pixels.dtype == torch.float32
    assert whole.pixels.is_contiguous()
    assert whole.pixels.min() >= 0
    assert whole.pixels.max() <= 1
    assert all(len(value) == len(INDEX) for value in whole.parameters.values())
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for parts in (list(shuffle.split(5)), list(torch.arange(12).split(1))):
        made = [views(images[rows], INDEX[rows], seed=1, epoch=2, view=view) for rows in parts]
        back = torch.cat(parts).argsort()
        # Parameters are equal bit by bit; a vectorised sum over pixels may round in another order.
        torch.testing.assert_close(torch.cat([part.pixels for part in made])[back], whole.pixels, rtol=0, atol=4e-6)
        for name, value in whole.parameters.items():
            assert torch.equal(torch.cat([part.parameters[name] for part in made])[back], value), name


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"none", "rotation_all"}))
def test_every_coordinate_changes_every_sample(images: Tensor, recipe: str) -> None:
    # Without chance to leave a sample alone, and without what views of a sample have in common.
    views = make_views(recipe, {"jitter_p": 1.0, "brightness": 0.3, "share": []})
    images = images[:1].expand(12, -1, -1, -1)
    base = pixels(views, images)
    for seed, epoch, view in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        changed = pixels(views, images, seed=seed, epoch=epoch, view=view)
        if changed.shape == base.shape:
            assert ((changed - base).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    distances = torch.cdist(base.flatten(1), base.flatten(1)) + torch.eye(12)
    assert distances.min() > 1e-3


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("shape", [(1, 8, 5), (3, 33, 33)])
def test_extremes_and_odd_sizes(recipe: str, value: int, shape: tuple[int, int, int]) -> None:
    images = torch.full((4, *shape), value, dtype=torch.uint8)
    options = {"tiles": 2} if recipe in ("jigsaw", "pirl") else {}
    for view in range(LAST_VIEW[recipe] + 1):
        made = pixels(make_views(recipe, options), images, INDEX[:4], view=view)
        assert made.isfinite().all()
        assert made.min() >= 0
        assert made.max() <= 1


def test_none_changes_nothing(images: Tensor) -> None:
    torch.testing.assert_close(pixels(make_views("none", {}), images), images / 255)


def test_input_is_not_written_to(images: Tensor) -> None:
    before = images.clone()
    views = make_views("simclr_imagenet", {"noise": 0.1, "cutout": 1, "solarize": 1, "face_mask": 1, "blur": 1})
    pixels(views, images)
    assert torch.equal(images, before)


def test_autocast_around_does_not_reach_in(images: Tensor) -> None:
    views = make_views("simclr_imagenet", {"size": 0.5})
    plain = pixels(views, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixels(views, images), plain)


def test_byol_treats_its_views_differently(images: Tensor) -> None:
    views, index = make_views("byol", {}), torch.arange(4000)
    first, second = (views.draw(index, seed=0, epoch=0, view=view) for view in (0, 1))
    assert (first["blur_sigma"] > 0).all()
    assert not first["solarize"].any()
    assert abs(float((second["blur_sigma"] > 0).float().mean()) - 0.1) < 0.03
    assert abs(float(second["solarize"].mean()) - 0.2) < 0.04


def test_multicrop_makes_two_large_and_some_small_views() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {
        "local_crops": 3,
        "global_size": 56,
        "local_size": 24,
        "local_scale": [0.05, 0.1],
        "global_scale": [0.5, 1],
    }
    views = make_views("multicrop", options)
    assert views.count == 5
    sizes = [tuple(pixels(views, images, INDEX[:2], view=view).shape[2:]) for view in range(5)]
    assert sizes == [(56, 56)] * 2 + [(24, 24)] * 3
    for view, (low, high) in ((0, (0.5, 1)), (1, (0.5, 1)), (2, (0.05, 0.1)), (4, (0.05, 0.1))):
        x0, y0, x1, y1 = views.draw(torch.arange(500), seed=0, epoch=0, view=view)["box"].unbind(1)
        area = (x1 - x0) * (y1 - y0)
        assert low - 1e-6 <= area.min()
        assert area.max() <= high + 1e-6
    blurred = [
        float((views.draw(torch.arange(2000), seed=0, epoch=0, view=v)["blur_sigma"] > 0).float().mean())
        for v in range(4)
    ]
    assert blurred == pytest.approx([1.0, 0.1, 0.5, 0.5], abs=0.05)
    native = make_views("multicrop_small", {})
    assert native.count == 6
    assert [pixels(native, images, INDEX[:2], view=view).shape[-1] for view in range(3)] == [64, 64, 32]
    assert make_views("simclr", {}).count is None


def test_shared_parameters_are_those_of_the_first_view() -> None:
    draw = [make_views("looc", {}).draw(torch.arange(300), seed=0, epoch=4, view=view) for view in range(4)]
    same = {
        name: [view for view in range(1, 4) if torch.equal(draw[0][name], draw[view][name])]
        for name in ("rotation_class", "hue", "brightness", "box", "flip")
    }
    assert same == {"rotation_class": [2], "hue": [3], "brightness": [3], "box": [], "flip": []}


def test_frames_move_together_and_flicker_apart(images: Tensor) -> None:
    views = make_views("frames", {"noise": 0})
    frames = [pixels(views, images, view=view) for view in (0, 1, 5)]
    assert torch.equal(frames[0], frames[1])
    assert torch.equal(frames[0], frames[2])
    noisy = make_views("frames", {})
    assert (pixels(noisy, images, view=1) - pixels(noisy, images, view=0)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    ("recipe", "options", "complaint"),
    [
        ("facs", {}, "did you mean 'faces'"),
        ("simclr_imagnet", {}, "did you mean 'simclr_imagenet'"),
        ("faces", {"rotaton": 3}, "did you mean 'rotation'"),
        ("simclr", {"local_crops": 3}, "has no parameter 'local_crops'"),
        ("multicrop", {"local_crop": 3}, "did you mean 'local_crops'"),
        ("multicrop", {"local_crops": 2.5}, "a whole number in 0..64"),
        ("multicrop", {"local_size": 1.5}, "2..4096 pixels, or a share"),
        ("multicrop", {"global_scale": 0.5}, "views.global_scale"),
        ("faces", {"flip": 1.5}, "a number in 0..1"),
        ("faces", {"flip": "often"}, "a number in 0..1"),
        ("faces", {"flip": True}, "a number in 0..1"),
        ("faces", {"flip": None}, "a number in 0..1"),
        ("faces", {"flip": []}, "a number in 0..1"),
        ("byol", {"blur": [1.0, 1.1]}, "a number in 0..1"),
        ("faces", {"noise": math.nan}, "a number in 0..1"),
        ("simclr", {"crop_scale": 0.5}, "within 0.01..1"),
        ("simclr", {"crop_scale": [0.9, 0.2]}, "within 0.01..1"),
        ("simclr", {"crop_scale": [0.2, 0.5, 0.9]}, "within 0.01..1"),
        ("simclr", {"crop_scale": [[0.2, 0.5], 0.9]}, "within 0.01..1"),
        ("mae", {"interpolation": "bicubc"}, "did you mean 'bicubic'"),
        ("frames", {"share": ["color"]}, "did you mean 'colour'"),
        ("jigsaw", {"tiles": 1}, "0, 2, 3 or 4"),
        ("jigsaw", {"tiles": 2, "permutations": 25}, "2..24, the orders of 4 tiles"),
    ],
)
def test_mistakes_are_named(recipe: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        make_views(recipe, options)
    assert complaint in str(error.value)


def test_overrides_are_taken_and_described() -> None:
    views = make_views("simclr", {"crop_scale": [0.5, 1], "hue": 0, "blur": [1, 0.1, 0.5]})
    assert [views.recipe(view).blur for view in range(4)] == [1.0, 0.1, 0.5, 0.5]
    assert {views.recipe(view).crop_scale for view in range(3)} == {(0.5, 1.0)}
    described = views.describe()
    assert described["hue"] == 0.0
    assert described["gray_p"] == RECIPES["simclr"][0].gray_p
    assert described["blur"] == [1.0, 0.1, 0.5]
    json.dumps(described)
    # The default number of puzzles is cut to what four tiles allow.
    assert make_views("jigsaw", {"tiles": 2}).recipe(0).permutations == 24
