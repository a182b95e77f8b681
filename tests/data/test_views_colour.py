"""Colour, blur, low resolution and what hides parts of an image, against torchvision and their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional

from armillary.components.counter import key, sample_keys
from armillary.data.views import Recipe, View, Views, make_views
from armillary.data.views.blur import REACH, gaussian_blur, low_resolution
from armillary.data.views.colour import draw

INDEX = torch.arange(12)
ADJUST = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)
NAMES = ("brightness", "contrast", "saturation", "hue")


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(12, 3, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(28, 24), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def view_of(images: Tensor, recipe: Recipe | str, view: int = 0, **options: object) -> View:
    views = make_views(recipe, options) if isinstance(recipe, str) else Views(recipe, "test")
    return views(images, torch.arange(len(images)), seed=0, epoch=0, view=view)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("changed", [NAMES, ("brightness", "contrast"), ("hue",), ("saturation", "hue"), ("contrast",)])
def test_jitter_is_torchvisions_in_every_order(images: Tensor, changed: tuple[str, ...], channels: int) -> None:
    # Values of the whole range, so that cutting off between the steps matters.
    pure = torch.randint(0, 256, (36, 3, 9, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    every = torch.cat([pure[:, :channels], images[:, :channels, :9, :7]])
    strengths = {name: 0.5 if name == "hue" else 0.8 for name in changed}
    shown = view_of(every, Recipe(jitter_p=0.9, **strengths))  # type: ignore[arg-type]
    drawn = shown.parameters
    assert len({tuple(order) for order in drawn["order"].tolist()}) > 12
    for at, image in enumerate(every / 255):
        expected = image
        for step in drawn["order"][at].tolist():
            if channels == 3 or step < 2:
                expected = ADJUST[step](expected, float(drawn[NAMES[step]][at]))
        torch.testing.assert_close(shown.pixels[at], expected, rtol=0, atol=3e-5)
        if not drawn["jitter"][at]:
            assert torch.equal(shown.pixels[at], image * 1.0) or torch.allclose(shown.pixels[at], image, atol=1e-6)


def test_jitter_draws_have_the_stated_distribution() -> None:
    recipe = Recipe(jitter_p=0.8, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, gray_p=0.2, solarize=0.3)
    drawn = draw(recipe, sample_keys(key(4), torch.arange(20_000)))
    on = drawn["jitter"] > 0
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        assert stats.kstest(drawn[name][on].double().numpy(), "uniform", args=(low, high - low)).pvalue > 1e-5
        assert (drawn[name][~on] == (0 if name == "hue" else 1)).all()
    for name, probability in (("jitter", 0.8), ("gray", 0.2), ("solarize", 0.3)):
        assert set(drawn[name].tolist()) == {0.0, 1.0}
        assert stats.binomtest(int(drawn[name].sum()), 20_000, probability).pvalue > 1e-5
    counts = np.unique(drawn["order"].numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-5


def test_gray_is_torchvisions(images: Tensor) -> None:
    gray = view_of(images, Recipe(gray_p=1.0)).pixels
    torch.testing.assert_close(gray, functional.rgb_to_grayscale(images / 255, 3), rtol=0, atol=2e-4)
    assert torch.equal(gray[:, 0], gray[:, 2])
    single = view_of(images[:, :1], Recipe(gray_p=1.0)).pixels
    torch.testing.assert_close(single, images[:, :1] / 255)


def test_solarize_is_torchvisions_where_drawn(images: Tensor) -> None:
    shown = view_of(images.repeat(4, 1, 1, 1), Recipe(solarize=0.5, solarize_threshold=0.3))
    chosen = shown.parameters["solarize"] > 0
    assert 8 < chosen.sum() < 40
    plain = images.repeat(4, 1, 1, 1) / 255
    torch.testing.assert_close(shown.pixels[~chosen], plain[~chosen])
    torch.testing.assert_close(shown.pixels[chosen], functional.solarize(plain[chosen], 0.3))


def test_blur_is_torchvisions_gaussian(images: Tensor) -> None:
    sigma = torch.tensor([0.1, 0.3, 0.34, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0, 2.2, 2.5, 3.0])
    made = gaussian_blur(images / 255, sigma)
    for at, value in enumerate(sigma.tolist()):
        size = 2 * math.ceil(round(REACH * value, 4)) + 1
        expected = functional.gaussian_blur(images[at] / 255, [size, size], [value, value])
        torch.testing.assert_close(made[at], expected, rtol=0, atol=1e-5)


def test_blur_on_tiny_images_keeps_flat_ones_flat() -> None:
    for shape in ((1, 1), (2, 5), (3, 3)):
        flat = torch.full((2, 3, *shape), 0.4)
        torch.testing.assert_close(gaussian_blur(flat, torch.tensor([0.5, 5.0])), flat)


def test_only_the_chosen_are_blurred(images: Tensor) -> None:
    many = images.repeat(10, 1, 1, 1)
    shown = view_of(many, Recipe(blur=0.4, blur_sigma=(1.0, 2.0)))
    sigma = shown.parameters["blur_sigma"]
    assert stats.binomtest(int((sigma > 0).sum()), 120, 0.4).pvalue > 1e-5
    changed = (shown.pixels - many / 255).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert torch.equal(changed, sigma > 0)
    assert sigma[changed].min() >= 1
    assert sigma[changed].max() <= 2


def test_noise_has_its_deviation_and_no_pattern() -> None:
    gray = torch.full((64, 1, 31, 21), 127, dtype=torch.uint8)
    noise = view_of(gray, Recipe(noise=0.05)).pixels - 127 / 255
    assert abs(float(noise.mean())) < 1e-3
    assert abs(float(noise.std()) - 0.05) < 5e-4
    flat = noise.flatten(1)
    across = torch.corrcoef(flat) - torch.eye(64)
    # Neighbouring pixels share a hash word, neighbouring samples an image size: neither may correlate.
    along = torch.corrcoef(torch.stack([flat[:, :-1].flatten(), flat[:, 1:].flatten()]))[0, 1]
    assert float(across.abs().max()) < 6 / math.sqrt(flat.shape[1])
    assert abs(float(along)) < 6 / math.sqrt(flat.numel())


def test_low_resolution_is_down_and_up(images: Tensor) -> None:
    plain, factor = images / 255, torch.tensor([2.0, 4.0, 1.0])
    made = low_resolution(plain[:3], factor, INDEX[:3], 0.0)
    for at, (height, width) in enumerate(((14, 12), (7, 6), (28, 24))):
        small = functional.resize(plain[at], [height, width], antialias=True)
        expected = functional.resize(small, [28, 24], antialias=False)
        torch.testing.assert_close(made[at], expected, rtol=0, atol=1e-5)


def test_low_res_pair_shows_the_same_picture(images: Tensor) -> None:
    high, low = (view_of(images, "low_res_pair", view, low_res_noise=0) for view in (0, 1))
    for name in ("box", "flip", "rotation", "brightness", "contrast"):
        assert torch.equal(high.parameters[name], low.parameters[name])
    assert (high.parameters["low_res_factor"] == 1).all()
    factor = low.parameters["low_res_factor"]
    assert factor.min() >= 2
    assert factor.max() <= 8
    assert ((high.pixels - low.pixels).abs().amax(dim=(1, 2, 3)) > 0.01).all()
    expected = low_resolution(high.pixels, factor, INDEX, 0.0)
    torch.testing.assert_close(low.pixels, expected, rtol=0, atol=1e-6)
    exact = view_of(images, "low_res_pair", 1, low_res=[4, 4]).parameters["low_res_factor"]
    torch.testing.assert_close(exact, torch.full((12,), 4.0))


@pytest.mark.parametrize("channels", [1, 3])
def test_mask_region_is_exactly_what_a_mask_changes(channels: int) -> None:
    # No cloth has this colour, and jitter, which the pair shares, does not make it so.
    images = torch.tensor([250, 0, 250], dtype=torch.uint8)[:channels, None, None].expand(60, channels, 48, 40)
    plain, masked = (view_of(images, "masked_face", view, face_mask=[0, 0.7]) for view in (0, 1))
    region = masked.parameters["mask_region"]
    assert region.dtype == torch.bool
    assert region.shape == (60, 1, 48, 40)
    assert not plain.parameters["mask_region"].any()
    changed = (plain.pixels != masked.pixels).any(dim=1, keepdim=True)
    assert torch.equal(changed, region)
    wearing = region.flatten(1).any(dim=1)
    assert stats.binomtest(int(wearing.sum()), 60, 0.7).pvalue > 1e-5
    share = region[wearing].float().mean(dim=(1, 2, 3))
    assert share.min() > 0.1
    assert share.max() < 0.45
    assert not region[:, :, : 48 // 3].any()
    colours = (masked.pixels * region).sum(dim=(2, 3))[wearing] / region[wearing].sum(dim=(2, 3))
    assert len(colours.unique(dim=0)) == int(wearing.sum())


def test_a_mask_stays_on_the_face_when_the_view_moves() -> None:
    images = torch.full((30, 3, 60, 60), 128, dtype=torch.uint8)
    still = view_of(images, Recipe(face_mask=1.0)).parameters["mask_region"]
    moved = view_of(images, Recipe(face_mask=1.0, shift=0.2)).parameters
    x0, y0 = moved["box"][:, 0] * 60, moved["box"][:, 1] * 60
    for at in range(30):
        shift = (round(-float(y0[at])), round(-float(x0[at])))
        expected = torch.zeros(60, 60, dtype=torch.bool)
        source = still[at, 0]
        rows, columns = torch.nonzero(source, as_tuple=True)
        rows, columns = rows + shift[0], columns + shift[1]
        inside = (rows >= 0) & (rows < 60) & (columns >= 0) & (columns < 60)
        expected[rows[inside], columns[inside]] = True
        # Shifts are not whole pixels: edges may differ by one.
        agreement = (expected & moved["mask_region"][at, 0]).sum() / (expected | moved["mask_region"][at, 0]).sum()
        assert agreement > 0.85


def test_cut_outs_have_their_box_and_area(images: Tensor) -> None:
    bright = torch.full((300, 3, 50, 40), 255, dtype=torch.uint8)
    shown = view_of(bright, "none", cutout=0.5, cutout_scale=[0.1, 0.2])
    filled = shown.pixels[:, 0] == 0.5
    cut = filled.flatten(1).any(dim=1)
    assert stats.binomtest(int(cut.sum()), 300, 0.5).pvalue > 1e-5
    x0, y0, x1, y1 = shown.parameters["cutout"].unbind(1)
    torch.testing.assert_close(filled.float().mean(dim=(1, 2)), (x1 - x0) * (y1 - y0), rtol=0, atol=0.02)
    assert ((x1 - x0) * (y1 - y0))[cut].min() >= 0.1 - 1e-5
    assert ((x1 - x0) * (y1 - y0)).max() <= 0.2 + 1e-5
    assert "cutout" not in view_of(images, "simclr").parameters
