"""Small networks between encoder and loss."""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Sequential):
    """The multi-layer perceptron that maps an embedding to the space where views are compared; dropped after training.

    Every layer but the last is linear without bias, batch norm, ReLU. As in SimCLR's published code the last is
    linear without bias and may be followed by batch norm (without shift, without ReLU). Without any batch norm, layers
    have a bias.

    Args:
        in_features: width of the embedding.
        hidden_features: width of the layers between.
        out_features: width of the projection.
        layers: linear layers, at least 1; 1 is a linear map.
        norm: batch norm after the hidden layers.
        last_norm: batch norm after the last layer.

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
    ) -> None:
        if layers < 1:
            raise ValueError(f"layers must be at least 1, found {layers}")
        super().__init__()
        width = in_features
        for number in range(1, layers):
            self.add_module(f"linear{number}", nn.Linear(width, hidden_features, bias=not norm))
            if norm:
                self.add_module(f"norm{number}", nn.BatchNorm1d(hidden_features))
            self.add_module(f"relu{number}", nn.ReLU(inplace=True))
            width = hidden_features
        self.add_module(f"linear{layers}", nn.Linear(width, out_features, bias=not (norm or last_norm)))
        if last_norm:
            self.add_module(f"norm{layers}", nn.BatchNorm1d(out_features, bias=False))

    def forward(self, embeddings: Tensor) -> Tensor:
        """``(batch, in_features)`` to ``(batch, out_features)``."""
        projected: Tensor = super().forward(embeddings)
        return projected
