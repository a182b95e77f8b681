"""The projector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armillary.components.heads import DINOHead, MaskedDecoder, Projector, Prototypes


def test_simclr_shape() -> None:
    """Linear without bias, batch norm, ReLU; linear without bias, batch norm without shift."""
    projector = Projector(6, 10, 4, layers=2, norm=True, last_norm=True)
    kinds = [type(layer) for layer in projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    names = [name for name, _ in projector.named_parameters()]
    assert names == ["linear1.weight", "norm1.weight", "norm1.bias", "linear2.weight", "norm2.weight"]
    projected = projector(torch.randn(32, 6))
    assert projected.shape == (32, 4)
    torch.testing.assert_close(projected.mean(0), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_without_norm(layers: int) -> None:
    projector = Projector(6, 10, 4, layers=layers, norm=False)
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert len(linears) == layers
    assert all(linear.bias is not None for linear in linears)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in projector)
    assert isinstance(projector[-1], nn.Linear)
    assert projector(torch.randn(1, 6)).shape == (1, 4)


def test_no_layer() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Projector(6, 10, 4, layers=0)


def test_last_layers_of_the_methods() -> None:
    """MoCo v3 and SimSiam: batch norm without scale and shift at the end; BYOL: a plain linear layer with bias."""
    last = Projector(6, 10, 4, layers=3, last_norm=True, last_scale=False)
    assert [type(layer) for layer in last][-2:] == [nn.Linear, nn.BatchNorm1d]
    assert not list(last[-1].parameters())
    byol = Projector(6, 10, 4, last_bias=True)
    assert isinstance(byol[-1], nn.Linear)
    assert byol[-1].bias is not None
    assert any(isinstance(layer, nn.GELU) for layer in Projector(6, 10, 4, norm=False, activation="gelu"))


def test_prototypes_are_directions() -> None:
    torch.manual_seed(0)
    prototypes = Prototypes(5, 7)
    vectors = torch.randn(2, 3, 5)
    expected = torch.nn.functional.cosine_similarity(vectors[:, :, None], prototypes.weight, dim=-1)
    torch.testing.assert_close(prototypes(vectors), expected)
    torch.testing.assert_close(prototypes(7 * vectors), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert prototypes(vectors).dtype == torch.float32
        torch.testing.assert_close(prototypes(vectors), expected)
    prototypes.weight.data *= 3
    torch.testing.assert_close(prototypes(vectors), expected)


def test_frozen_prototypes_get_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    head = DINOHead(4, 6, hidden_features=8, bottleneck=5)
    embeddings = torch.randn(3, 4)
    torch.testing.assert_close(head(embeddings, frozen=True), head(embeddings))
    head(embeddings, frozen=True).square().sum().backward()
    weight = head.prototypes.weight
    assert weight.grad is not None
    assert not weight.grad.any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.mlp.parameters())
    head(embeddings).square().sum().backward()
    assert weight.grad.any()


def test_dino_head_has_three_layers_with_biases() -> None:
    head = DINOHead(4, 6, hidden_features=8, bottleneck=5)
    shapes = [tuple(parameter.shape) for parameter in head.parameters()]
    assert shapes == [(8, 4), (8,), (8, 8), (8,), (5, 8), (5,), (6, 5)]


def test_the_decoder_puts_patches_back_in_place() -> None:
    torch.manual_seed(0)
    decoder = MaskedDecoder(6, (2, 3), 4, width=8, depth=1, heads=2).eval()
    cls, patches = torch.randn(2, 6), torch.randn(2, 3, 6)
    keep = torch.tensor([[4, 0, 2], [1, 5, 3]])
    predicted = decoder(cls, patches, keep)
    assert predicted.shape == (2, 6, 4)
    # The order in which the seen patches come does not matter, where they lie does.
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(decoder(cls, patches[:, order], keep[:, order]), predicted)
    assert not torch.allclose(decoder(cls, patches, keep[:, order]), predicted)
    # Without layers a patch that was seen is predicted from itself, a hidden one from the mask token and its place.
    decoder.blocks = nn.Sequential()
    plain = decoder(cls, patches, keep)
    seen = decoder.predict(decoder.norm(decoder.embed(patches[0, 1]) + decoder.positions[0, 0]))
    hidden = decoder.predict(decoder.norm(decoder.mask_token[0, 0] + decoder.positions[0, 3]))
    torch.testing.assert_close(plain[0, 0], seen)
    torch.testing.assert_close(plain[0, 3], hidden)
