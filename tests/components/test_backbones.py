"""Backbones: shapes, options, and behaviour under autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from armillary.components.backbones import build_encoder
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec


def spec(name: str = "small_convnet", dim: int = 32, **options: Any) -> BackboneSpec:
    return BackboneSpec(name=name, embedding_dim=dim, **options)


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (56, 48), (112, 112)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pool", ["flat", "mean"])
def test_small_convnet_embeds_every_size(size: tuple[int, int], channels: int, pool: str) -> None:
    encoder = build_encoder(spec(pool=pool, width=8), in_channels=channels, image_size=size)
    images = torch.rand(3, channels, *size)
    before = images.clone()
    embedding = encoder(images)
    assert embedding.shape == (3, 32)
    assert torch.equal(images, before)
    embedding.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in encoder.parameters())


def test_small_convnet_is_the_network_it_says() -> None:
    # The same weights through plain functions, in the usual memory layout.
    torch.manual_seed(0)
    encoder = build_encoder(spec(), in_channels=1, image_size=(24, 20))
    for _ in range(3):
        encoder(torch.rand(16, 1, 24, 20))
    encoder.eval()
    images = torch.rand(5, 1, 24, 20)
    weights: dict[str, torch.Tensor] = dict(encoder.state_dict())

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, gain, shift = (weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(values, mean, var, gain, shift)

    hidden = (images - 0.5) / 0.25
    for block in range(3):
        hidden = F.max_pool2d(F.conv2d(hidden, weights[f"features.{4 * block}.weight"], padding=1), 2)
        hidden = F.relu(norm(hidden, f"features.{4 * block + 2}"))
    expected = norm(hidden.flatten(1) @ weights["neck.weight"].T, "norm")
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_evaluation_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(spec(dropout=0.5), in_channels=1, image_size=(16, 16))
    encoder(torch.rand(8, 1, 16, 16))
    encoder.eval()
    images = torch.rand(6, 1, 16, 16)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone, rtol=1e-4, atol=1e-5)


def test_training_embeddings_are_normalised_over_the_batch() -> None:
    embedding = build_encoder(spec(), in_channels=1, image_size=(16, 16))(torch.rand(64, 1, 16, 16))
    torch.testing.assert_close(embedding.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(embedding.std(0, unbiased=False), torch.ones(32), rtol=0, atol=0.02)


def test_options_change_the_network() -> None:
    narrow, wide = (build_encoder(spec(width=width), in_channels=1, image_size=(16, 16)) for width in (8, 16))
    count = [sum(weight.numel() for weight in encoder.parameters()) for encoder in (narrow, wide)]
    assert count[1] > 2 * count[0]
    torch.manual_seed(0)
    dropped = build_encoder(spec(dropout=0.9), in_channels=1, image_size=(16, 16))
    images = torch.rand(8, 1, 16, 16)
    assert not torch.equal(dropped(images), dropped(images))


@pytest.mark.parametrize("name", ["small_convnet", "timm/resnet10t"])
def test_bf16_autocast_stays_close(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(spec(name), in_channels=1, image_size=(32, 32))
    other = copy.deepcopy(encoder)
    images = torch.rand(16, 1, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = other(images).float()
    assert F.cosine_similarity(half, encoder(images)).min() > 0.99
    half.square().mean().backward()
    assert all(weight.dtype == torch.float32 for weight in other.parameters())


def test_pixels_are_pixels_less_the_mean() -> None:
    encoder: Any = build_encoder(spec("pixels"), in_channels=1, image_size=(4, 3))
    assert list(encoder.parameters()) == []
    images = torch.randint(0, 256, (10, 1, 4, 3)).to(torch.uint8)
    encoder.fit(images)
    embedding = encoder(images / 255)
    assert embedding.shape == (10, 12)
    torch.testing.assert_close(embedding.mean(0), torch.zeros(12), rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding - embedding[:1], (images / 255 - images[:1] / 255).flatten(1))
    from_bytes = encoder.mean.clone()
    encoder.fit(images / 255)
    torch.testing.assert_close(encoder.mean, from_bytes)
    # The mean travels with the state, so that a stored baseline needs no data.
    fresh: Any = build_encoder(spec("pixels"), in_channels=1, image_size=(4, 3))
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(fresh(images / 255), encoder(images / 255))


def test_only_pixels_are_fitted() -> None:
    assert not hasattr(build_encoder(spec(), in_channels=1, image_size=(16, 16)), "fit")


@pytest.mark.parametrize(("channels", "model"), [(1, "resnet18"), (3, "mobilenetv3_small_050")])
def test_timm_models_embed(channels: int, model: str) -> None:
    encoder = build_encoder(spec(f"timm/{model}"), in_channels=channels, image_size=(32, 32))
    assert encoder(torch.rand(2, channels, 32, 32)).shape == (2, 32)


def test_timm_vision_transformers_are_made_for_the_images() -> None:
    encoder = build_encoder(
        spec("timm/vit_tiny_patch16_224", patch_size=4, depth=2), in_channels=1, image_size=(28, 24)
    )
    assert encoder(torch.rand(2, 1, 28, 24)).shape == (2, 32)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "small_convnt"}, "did you mean 'small_convnet'"),
        ({"name": "resnet18"}, "timm/<model>"),
        ({"name": "timm/resnet81"}, "did you mean timm/resnet"),
        ({"name": "timm/resnet18", "flying": True}, "flying"),
        ({"widht": 8}, "did you mean 'width'"),
        ({"width": 2}, "an integer in 4..512"),
        ({"width": 8.5}, "an integer in 4..512"),
        ({"width": True}, "an integer in 4..512"),
        ({"dropout": 1.0}, "a number in 0..0.9"),
        ({"dropout": float("nan")}, "a number in 0..0.9"),
        ({"pool": "max"}, "flat, mean"),
        ({"pool": ["flat"]}, "flat, mean"),
        ({"name": "pixels", "width": 3}, "has no option 'width'"),
        ({"name": "small_vit", "pach": 4}, "did you mean 'patch'"),
        ({"name": "small_vit", "width": 50}, "a multiple of 4"),
        ({"name": "small_vit", "width": 64, "heads": 3}, "3 heads for a width of 64"),
        ({"name": "small_vit", "patch": 5}, "do not divide images of 32 x 32 px"),
        ({"name": "small_vit", "pool": "flat"}, "cls, mean"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        build_encoder(spec(**changes), in_channels=1, image_size=(32, 32))
    assert complaint in str(error.value)


def test_images_too_small_for_the_network() -> None:
    with pytest.raises(UserError, match="8 x 7 px is too small"):
        build_encoder(spec(), in_channels=1, image_size=(8, 7))
