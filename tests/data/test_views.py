"""Views: a function of (seed, epoch, sample, view) alone, with the distributions the recipes state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from armillary.components.counter import key, mix, sample_keys, shuffled, uniforms
from armillary.data.views import RECIPES, Recipe, Views, make_views
from armillary.spec.errors import UserError


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(12, 3, 6, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(28, 24), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


INDEX = torch.tensor([7, 3, 10**9, 0, 11, 5, 2, 2**40, 9, 1, 8, 4])


def test_counter_is_splitmix64() -> None:
    # The first outputs of the reference generator seeded with 0: mix(0), mix(golden), mix(2 golden).
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([0, golden - 2**64, (2 * golden) % 2**64], dtype=torch.int64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in mix(states).tolist()] == expected


def test_uniforms_are_uniform_and_independent() -> None:
    drawn = uniforms(sample_keys(key(1, 2), torch.arange(20_000)), 6).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-5
    correlation = np.corrcoef(drawn.T) - np.eye(6)
    neighbours = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in drawn.T]
    # Six standard errors of a correlation of 20,000 pairs.
    assert max(np.abs(correlation).max(), np.abs(neighbours).max()) < 6 / math.sqrt(20_000)


def test_keys_depend_on_every_part_and_on_order() -> None:
    keys = {key(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(keys) == 512


def test_shuffling_does_not_see_the_order_it_gets() -> None:
    values = torch.arange(100) * 7
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled(values, 3), shuffled(values[order], 3))
    assert not torch.equal(shuffled(values, 3), shuffled(values, 4))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_view_does_not_depend_on_its_batch(images: Tensor, recipe: str, channels: int) -> None:
    views, images = make_views(recipe, {}), images[:, :channels]
    whole = views(images, INDEX, seed=1, epoch=2, view=0)
    assert whole.shape == images.shape
    assert whole.dtype == torch.float32
    assert whole.min() >= 0
    assert whole.max() <= 1
    backwards = views(images.flip(0), INDEX.flip(0), seed=1, epoch=2, view=0).flip(0)
    halves = torch.cat(
        [views(images[part], INDEX[part], seed=1, epoch=2, view=0) for part in (slice(0, 5), slice(5, None))]
    )
    alone = torch.cat([views(images[at : at + 1], INDEX[at : at + 1], seed=1, epoch=2, view=0) for at in range(12)])
    for other in (backwards, halves, alone):
        # Parameters are equal bit by bit; a vectorised sum over pixels may round in another order.
        torch.testing.assert_close(other, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"none"}))
def test_every_coordinate_changes_every_sample(images: Tensor, recipe: str) -> None:
    views = make_views(recipe, {"jitter_p": 1.0})
    images = images[:1].expand(12, -1, -1, -1)
    base = views(images, INDEX, seed=1, epoch=2, view=0)
    for other in ({"seed": 2}, {"epoch": 3}, {"view": 1}):
        changed = views(images, INDEX, **{"seed": 1, "epoch": 2, "view": 0, **other})
        assert ((changed - base).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    distances = torch.cdist(base.flatten(1), base.flatten(1)) + torch.eye(12)
    assert distances.min() > 1e-3


def test_none_changes_nothing(images: Tensor) -> None:
    plain = make_views("none", {})(images, INDEX, seed=0, epoch=0, view=0)
    torch.testing.assert_close(plain, images / 255)


def test_input_is_not_written_to(images: Tensor) -> None:
    before = images.clone()
    make_views("simclr", {"noise": 0.1})(images, INDEX, seed=0, epoch=0, view=0)
    assert torch.equal(images, before)


def drawn(recipe: Recipe, count: int = 20_000) -> dict[str, np.ndarray]:
    keys = sample_keys(key(4), torch.arange(count))
    return {name: values.numpy() for name, values in Views(recipe, "test").parameters(keys).items()}


RANGES = [
    ("rotation", {"rotation": 20.0}, -20, 20),
    ("zoom", {"zoom": 0.2}, 0.8, 1.2),
    ("shift_x", {"shift": 0.1}, -0.1, 0.1),
    ("shift_y", {"shift": 0.1}, -0.1, 0.1),
    ("area", {"crop_scale": (0.2, 0.9)}, 0.2, 0.9),
    ("brightness", {"brightness": 0.4}, 0.6, 1.4),
    ("contrast", {"contrast": 0.4}, 0.6, 1.4),
    ("saturation", {"saturation": 0.4}, 0.6, 1.4),
    ("hue", {"hue": 0.1}, -0.1, 0.1),
]


@pytest.mark.parametrize(("name", "options", "low", "high"), RANGES)
def test_parameters_have_the_stated_distribution(
    name: str, options: dict[str, object], low: float, high: float
) -> None:
    values = drawn(Recipe(**options))[name]  # type: ignore[arg-type]
    assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-5


def test_ratio_is_log_uniform_and_switches_have_their_probability() -> None:
    values = drawn(Recipe(crop_ratio=(0.75, 4 / 3), flip=0.5, jitter_p=0.8, gray_p=0.2))
    low, high = math.log(0.75), math.log(4 / 3)
    assert stats.kstest(np.log(values["ratio"]), "uniform", args=(low, high - low)).pvalue > 1e-5
    for name, probability in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2)):
        assert set(values[name].tolist()) == {0.0, 1.0}
        assert stats.binomtest(int(values[name].sum()), 20_000, probability).pvalue > 1e-5


def test_flip_is_a_mirror(images: Tensor) -> None:
    view = make_views("none", {"flip": 1.0})(images, INDEX, seed=0, epoch=0, view=0)
    torch.testing.assert_close(view, images.flip(3) / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (48, 32)])
def test_rotation_keeps_shapes_round(height: int, width: int) -> None:
    # A dot beside the centre moves on a circle, in pixels, whatever the image's proportions.
    views = Views(Recipe(rotation=180), "test")
    yy, xx = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    dot = torch.exp(-((xx - width / 2 - 9) ** 2 + (yy - height / 2) ** 2) / 8)
    images = (dot * 255).to(torch.uint8).expand(50, 1, height, width)
    index = torch.arange(50)
    turned = views(images, index, seed=0, epoch=0, view=0)[:, 0]
    mass = turned.sum(dim=(1, 2))
    x = (turned * xx).sum(dim=(1, 2)) / mass - width / 2
    y = (turned * yy).sum(dim=(1, 2)) / mass - height / 2
    torch.testing.assert_close((x**2 + y**2).sqrt(), torch.full((50,), 9.0), rtol=0, atol=0.15)
    angle = views.parameters(sample_keys(key(11, 0, 0, 0), index))["rotation"]
    difference = torch.rad2deg(torch.atan2(y, x)) + angle
    assert ((difference + 180) % 360 - 180).abs().max() < 1.0


def test_crops_stay_inside_and_have_their_area() -> None:
    views = Views(Recipe(crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3)), "test")
    parameters = views.parameters(sample_keys(key(9), torch.arange(5000)))
    theta = views.geometry(parameters, 32, 32)
    half_w, half_h = theta[:, 0, 0], theta[:, 1, 1]
    assert (theta[:, 0, 2].abs() + half_w).max() <= 1 + 1e-5
    assert (theta[:, 1, 2].abs() + half_h).max() <= 1 + 1e-5
    uncut = (half_w < 1) & (half_h < 1)
    assert uncut.float().mean() > 0.8
    torch.testing.assert_close((half_w * half_h)[uncut], parameters["area"][uncut])


def test_brightness_and_contrast_are_those_of_torchvision() -> None:
    from torchvision.transforms.v2 import functional

    # Mid-tones only: torchvision cuts off at 0 and 1 between the steps, here it happens once at the end.
    image = torch.randint(90, 150, (1, 3, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    index = torch.tensor([3])
    views = Views(Recipe(brightness=0.3, contrast=0.3, saturation=0.3), "test")
    parameters = views.parameters(sample_keys(key(11, 0, 0, 0), index))
    expected = functional.adjust_brightness(image.float() / 255, float(parameters["brightness"]))
    expected = functional.adjust_contrast(expected, float(parameters["contrast"]))
    expected = functional.adjust_saturation(expected, float(parameters["saturation"]))
    # torchvision rounds the luma weights to four digits.
    torch.testing.assert_close(views(image, index, seed=0, epoch=0, view=0), expected, rtol=0, atol=1e-3)


def test_gray_has_no_colour_and_hue_keeps_luma(images: Tensor) -> None:
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    plain = (images // 4 + 96).to(torch.uint8)
    gray = make_views("none", {"gray_p": 1.0})(plain, INDEX, seed=0, epoch=0, view=0)
    torch.testing.assert_close(gray, ((plain / 255) * luma).sum(1, keepdim=True).expand_as(gray), rtol=0, atol=1e-4)
    turned = make_views("none", {"hue": 0.5})(plain, INDEX, seed=0, epoch=0, view=0)
    torch.testing.assert_close((turned * luma).sum(1), (plain / 255 * luma).sum(1), rtol=0, atol=1e-4)
    assert (turned - plain / 255).abs().amax(dim=(1, 2, 3)).median() > 0.02


def test_noise_has_its_deviation_and_no_pattern() -> None:
    gray = torch.full((64, 1, 31, 21), 127, dtype=torch.uint8)
    noise = make_views("none", {"noise": 0.05})(gray, torch.arange(64), seed=0, epoch=0, view=0) - 127 / 255
    assert abs(float(noise.mean())) < 1e-3
    assert abs(float(noise.std()) - 0.05) < 5e-4
    flat = noise.flatten(1)
    across = torch.corrcoef(flat) - torch.eye(64)
    # Neighbouring pixels share a hash word, neighbouring samples an image size: neither may correlate.
    along = torch.corrcoef(torch.stack([flat[:, :-1].flatten(), flat[:, 1:].flatten()]))[0, 1]
    assert float(across.abs().max()) < 6 / math.sqrt(flat.shape[1])
    assert abs(float(along)) < 6 / math.sqrt(flat.numel())


@pytest.mark.parametrize(
    ("recipe", "options", "complaint"),
    [
        ("facs", {}, "did you mean 'faces'"),
        ("faces", {"rotaton": 3}, "did you mean 'rotation'"),
        ("faces", {"flip": 1.5}, "a number in 0..1"),
        ("faces", {"flip": "often"}, "a number in 0..1"),
        ("faces", {"flip": True}, "a number in 0..1"),
        ("faces", {"flip": None}, "a number in 0..1"),
        ("faces", {"noise": math.nan}, "a number in 0..1"),
        ("simclr", {"crop_scale": 0.5}, "within 0.01..1"),
        ("simclr", {"crop_scale": [0.9, 0.2]}, "within 0.01..1"),
        ("simclr", {"crop_scale": [0.2, 0.5, 0.9]}, "within 0.01..1"),
    ],
)
def test_mistakes_are_named(recipe: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        make_views(recipe, options)
    assert complaint in str(error.value)


def test_overrides_are_taken_and_described() -> None:
    views = make_views("simclr", {"crop_scale": [0.5, 1], "hue": 0})
    assert views.recipe.crop_scale == (0.5, 1.0)
    assert views.describe()["hue"] == 0.0
    assert views.describe()["gray_p"] == RECIPES["simclr"].gray_p
