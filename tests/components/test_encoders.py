"""What encoders give beside embeddings: maps of stages, tokens of patches; sizes of images they take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.components.backbones import build_encoder
from armillary.components.encoders import (
    MapEncoder,
    TokenEncoder,
    check_ability,
    check_sizes,
    map_encoder,
    token_encoder,
)
from armillary.components.transformers import TransformerEncoder
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec
from armillary.testing import tiny

SIZE = (16, 24)


def make(name: str, size: tuple[int, int] = SIZE, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = BackboneSpec(name=name, embedding_dim=10, **options)
    return build_encoder(spec, in_channels=1, image_size=size).eval()


def small_vit(**options: Any) -> Any:
    return make("small_vit", **{"width": 24, "depth": 2, "heads": 2, "patch": 4, **options})


@pytest.mark.parametrize(
    "name", ["small_convnet", "timm/resnet10t", "timm/mobilenetv3_small_050", "timm/convnext_atto", "timm/regnetx_002"]
)
def test_maps_of_every_stage(name: str) -> None:
    encoder = make(name, (64, 64))
    images = torch.rand(2, 1, 64, 64)
    mapped = map_encoder(encoder)
    with torch.no_grad():
        stages = mapped.stages(images)
        torch.testing.assert_close(mapped.embed_map(stages[-1]), encoder(images))
    assert tuple(stage.shape[1] for stage in stages) == mapped.stage_channels
    sides = [stage.shape[2] for stage in stages]
    assert sides == sorted(sides, reverse=True)
    assert len(sides) >= 3
    assert not isinstance(encoder, TokenEncoder)


@pytest.mark.parametrize("name", ["small_convnet", "timm/resnet10t"])
def test_convolutional_networks_take_crops_of_two_sizes(name: str) -> None:
    encoder = make(name, (32, 32), **({"pool": "mean"} if name == "small_convnet" else {}))
    check_sizes(encoder, [(32, 32), (20, 20)], name)
    assert encoder(torch.rand(2, 1, 20, 20)).shape == (2, 10)


def test_sizes_that_do_not_fit() -> None:
    check_sizes(make("small_convnet"), [SIZE, SIZE], "small_convnet")
    with pytest.raises(UserError, match=r"takes one size only(.|\n)*mean") as error:
        check_sizes(make("small_convnet"), [SIZE, (8, 8)], "small_convnet")
    assert "backbone.pool" in str(error.value)
    with pytest.raises(UserError, match="takes one size only"):
        check_sizes(make("pixels"), [SIZE, (8, 8)], "pixels")
    check_sizes(small_vit(), [SIZE, (8, 8)], "small_vit")
    with pytest.raises(UserError, match="do not divide images of 10 x 8"):
        check_sizes(small_vit(), [SIZE, (10, 8)], "small_vit")


def test_an_ability_that_is_not_there() -> None:
    check_ability(make("pixels"), "any", "mine", "pixels")
    with pytest.raises(UserError, match=r"mine uses the encoder's patch tokens(.|\n)*small_vit"):
        check_ability(make("small_convnet"), "tokens", "mine", "small_convnet")
    with pytest.raises(UserError, match=r"feature maps(.|\n)*timm/resnet18"):
        map_encoder(small_vit())
    with pytest.raises(UserError, match="patch tokens"):
        token_encoder(make("timm/resnet10t", (32, 32)))


def images(size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_tokens_of_the_small_transformer(pool: str, positions: str) -> None:
    encoder = small_vit(pool=pool, positions=positions, layer_scale=0.1)
    tokens = encoder.tokens(images())
    assert (encoder.grid, encoder.patch_size, encoder.token_dim) == ((4, 6), (4, 4), 24)
    assert tokens.cls.shape == (3, 24)
    assert tokens.patches.shape == (3, 24, 24)
    assert tokens.queries is None
    torch.testing.assert_close(encoder.embed_tokens(tokens), encoder(images()))
    assert encoder.tokens(images((8, 8))).patches.shape == (3, 4, 24)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_transformer_of_timm_gives_what_timm_gives(model: str) -> None:
    import timm

    options: dict[str, Any] = {"patch_size": 8, "depth": 2}
    torch.manual_seed(0)
    theirs: Any = timm.create_model(model, img_size=(32, 32), in_chans=1, num_classes=0, **options).eval()
    torch.manual_seed(0)
    ours: Any = build_encoder(
        BackboneSpec(name=f"timm/{model}", embedding_dim=10, **options), in_channels=1, image_size=(32, 32)
    ).eval()
    pixels = images((32, 32))
    features = theirs.forward_features((pixels - 0.5) / 0.25)
    tokens = ours.tokens(pixels)
    torch.testing.assert_close(tokens.cls, features[:, 0])
    torch.testing.assert_close(tokens.patches, features[:, theirs.num_prefix_tokens :])
    torch.testing.assert_close(ours(pixels), ours.neck(theirs.forward_head(features, pre_logits=True)))
    theirs.set_input_size((16, 16))
    local = theirs.forward_features((images((16, 16)) - 0.5) / 0.25)
    torch.testing.assert_close(ours.tokens(images((16, 16))).patches, local[:, theirs.num_prefix_tokens :])


def test_what_is_masked_cannot_be_seen() -> None:
    encoder = small_vit()
    masked = torch.zeros(3, 24, dtype=torch.bool)
    masked[:, 7] = True
    before = images()
    after = before.clone()
    after[:, :, 4:8, 4:8] = 0.3  # patch 7 stands in row 1, column 1
    kept = encoder.tokens(before, masked=masked)
    torch.testing.assert_close(kept.patches, encoder.tokens(after, masked=masked).patches)
    assert not torch.allclose(encoder.tokens(before).patches, encoder.tokens(after).patches)
    kept.patches.sum().backward()
    assert float(encoder.body.mask_token.grad.abs().sum()) > 0


def test_only_what_is_kept_enters() -> None:
    encoder = small_vit()
    everything = torch.arange(24).expand(3, 24)
    whole = encoder.tokens(images())
    order = everything.flip(1)
    torch.testing.assert_close(encoder.tokens(images(), keep=order).patches, whole.patches.flip(1))
    keep = torch.tensor([[0, 5, 9], [1, 2, 3], [23, 0, 4]])
    some = encoder.tokens(images(), keep=keep)
    assert some.patches.shape == (3, 3, 24)
    # Alone in the batch, with everything else painted over, a sample's kept tokens are the same.
    alone = torch.zeros(1, 1, *SIZE)
    for patch in (1, 2, 3):
        column = slice(4 * patch, 4 * patch + 4)
        alone[..., :4, column] = images()[1:2, :, :4, column]
    torch.testing.assert_close(encoder.tokens(alone, keep=keep[1:2]).patches, some.patches[1:2])


def test_queries_see_and_are_not_seen() -> None:
    encoder = small_vit()
    queries = torch.randn(3, 2, 24)
    whole, asked = encoder.tokens(images()), encoder.tokens(images(), queries=queries)
    torch.testing.assert_close(asked.patches, whole.patches)
    torch.testing.assert_close(asked.cls, whole.cls)
    assert asked.queries is not None
    assert asked.queries.shape == (3, 2, 24)
    changed = images()
    changed[:, :, :4, :4] = 0
    other = encoder.tokens(changed, queries=queries)
    assert not torch.allclose(other.queries, asked.queries)
    moved = torch.cat([queries[:, :1], torch.zeros(3, 1, 24)], dim=1)
    assert not torch.allclose(encoder.tokens(images(), queries=moved).queries[:, 0], asked.queries[:, 0])


def test_half_precision_stays_close() -> None:
    encoder = small_vit()
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images()).float()
    torch.testing.assert_close(half, encoder(images()), rtol=0.05, atol=0.05)


def test_a_transformer_trains() -> None:
    encoder = small_vit(positions="learned").train()
    other = copy.deepcopy(encoder)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    target = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (encoder(images()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(encoder.body.pos_embed, other.body.pos_embed)


@pytest.mark.parametrize("cls", [tiny.TinyEncoder, tiny.TinyTokenEncoder, tiny.FlatEncoder])
def test_tiny_encoders(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    encoder: Any = cls().eval()
    pixels, local = torch.rand(2, 1, 6, 6), torch.rand(2, 1, 4, 4)
    embedding = encoder(pixels)
    assert encoder(local).shape == embedding.shape
    if isinstance(encoder, MapEncoder):
        stages = encoder.stages(pixels)
        assert tuple(stage.shape[1] for stage in stages) == encoder.stage_channels
        torch.testing.assert_close(encoder.embed_map(stages[-1]), embedding)
    if isinstance(encoder, TokenEncoder):
        tokens = encoder.tokens(pixels, masked=torch.zeros(2, 9, dtype=torch.bool))
        assert tokens.patches.shape == (2, 9, encoder.token_dim)
        torch.testing.assert_close(encoder.embed_tokens(tokens), embedding)
        assert encoder.tokens(pixels, keep=torch.tensor([[0, 4], [3, 8]])).patches.shape == (2, 2, encoder.token_dim)
    assert isinstance(tiny.TinyTokenEncoder(), TransformerEncoder)
