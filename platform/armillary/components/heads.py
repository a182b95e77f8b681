"""Small networks behind the encoder: projector, predictor, prototypes, DINO's head, a masked autoencoder's decoder."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from armillary.components.patches import grid_coordinates, sincos_positions
from armillary.components.transformers import make_blocks
from armillary.losses.tensors import normalize, widen


class Projector(nn.Sequential):
    """The multi-layer perceptron that maps an embedding to the space where views are compared; dropped after training.

    Every layer but the last is linear without bias, batch norm, activation. As in SimCLR's published code the last is
    linear without bias and may be followed by batch norm (without shift, without activation). Without any batch norm,
    layers have a bias. A predictor is the same network behind a projector.

    Args:
        in_features: width of the embedding.
        hidden_features: width of the layers between.
        out_features: width of the projection.
        layers: linear layers, at least 1; 1 is a linear map.
        norm: batch norm after the hidden layers.
        last_norm: batch norm after the last layer.
        last_scale: whether that norm scales; MoCo v3 and SimSiam go without.
        last_bias: a bias in the last linear layer; by default when no batch norm is anywhere.
        activation: after the hidden layers.

    Raises:
        ValueError: fewer than one layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        layers: int = 2,
        norm: bool = True,
        last_norm: bool = False,
        last_scale: bool = True,
        last_bias: bool | None = None,
        activation: Literal["relu", "gelu"] = "relu",
    ) -> None:
        if layers < 1:
            raise ValueError(f"layers must be at least 1, found {layers}")
        super().__init__()
        width = in_features
        for number in range(1, layers):
            self.add_module(f"linear{number}", nn.Linear(width, hidden_features, bias=not norm))
            if norm:
                self.add_module(f"norm{number}", nn.BatchNorm1d(hidden_features))
            self.add_module(f"{activation}{number}", nn.ReLU(inplace=True) if activation == "relu" else nn.GELU())
            width = hidden_features
        bias = not (norm or last_norm) if last_bias is None else last_bias
        self.add_module(f"linear{layers}", nn.Linear(width, out_features, bias=bias))
        if last_norm:
            self.add_module(f"norm{layers}", nn.BatchNorm1d(out_features, affine=last_scale, bias=False))

    def forward(self, embeddings: Tensor) -> Tensor:
        """``(batch, in_features)`` to ``(batch, out_features)``."""
        projected: Tensor = super().forward(embeddings)
        return projected


class Prototypes(nn.Module):
    """Cosines with learned directions, in float32 at least.

    Directions are scaled to unit length whenever they are used, as a weight norm whose gain stays 1 does, and as SwAV
    does in place: so nothing has to be written to parameters, which an engine may have sharded.

    Args:
        dim: width of the vectors.
        count: directions.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, vectors: Tensor, frozen: bool = False) -> Tensor:
        """Vectors ``(..., dim)``, of any length, to ``(..., count)`` in [-1, 1].

        Args:
            vectors: what to compare.
            frozen: the directions get a gradient of zero, as in the first epochs of DINO and SwAV; give
                ``self.epoch < n``.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
            return normalize(widen(vectors)) @ normalize(weight).T


class DINOHead(nn.Module):
    """The head of DINO, iBOT and DINOv2 (Caron et al. 2021, appendix C): perceptron, bottleneck, prototypes.

    Three linear layers with biases and GELU between, unit length, prototypes of unit length.

    Args:
        in_features: width of the embedding or token.
        prototypes: number of outputs.
        hidden_features: width of the layers between.
        bottleneck: width in front of the prototypes.
        layers: linear layers of the perceptron.
    """

    def __init__(
        self, in_features: int, prototypes: int, hidden_features: int = 2048, bottleneck: int = 256, layers: int = 3
    ) -> None:
        super().__init__()
        self.mlp = Projector(in_features, hidden_features, bottleneck, layers, norm=False, activation="gelu")
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck, prototypes)

    def forward(self, embeddings: Tensor, frozen: bool = False) -> Tensor:
        """``(..., in_features)`` to logits ``(..., prototypes)``; see :class:`Prototypes` for ``frozen``."""
        logits: Tensor = self.prototypes(self.mlp(embeddings), frozen)
        return logits


class MaskedDecoder(nn.Module):
    """The masked autoencoder's decoder (He et al. 2022): from the patches that were seen to all patches.

    A linear map to its width, a learned token in place of hidden patches, fixed positions, transformer layers, a linear
    map to what is predicted of each patch.

    Args:
        token_dim: width of the encoder's tokens.
        grid: rows and columns of all patches.
        out_features: numbers predicted for each patch.
        width: of the tokens inside, a multiple of 4 and of ``heads``.
        depth: layers.
        heads: attention heads.
    """

    positions: Tensor

    def __init__(
        self,
        token_dim: int,
        grid: tuple[int, int],
        out_features: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(token_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("positions", sincos_positions(grid_coordinates(grid), width)[None])
        self.blocks = make_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, out_features)

    def forward(self, cls: Tensor, patches: Tensor, keep: Tensor) -> Tensor:
        """Predicts every patch.

        Args:
            cls: ``(batch, token_dim)``.
            patches: ``(batch, K, token_dim)``, those that were seen.
            keep: ``(batch, K)`` int64, which they are.

        Returns:
            ``(batch, T, out_features)``, all patches in order.
        """
        seen, first = self.embed(patches), self.embed(cls[:, None])
        blank = self.mask_token.to(seen.dtype).expand(len(seen), self.positions.shape[1], -1)
        whole = blank.scatter(1, keep[..., None].expand_as(seen), seen) + self.positions.to(seen.dtype)
        hidden = self.norm(self.blocks(torch.cat([first, whole], dim=1)))
        predicted: Tensor = self.predict(hidden[:, 1:])
        return predicted
