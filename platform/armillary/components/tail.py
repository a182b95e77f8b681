"""Layers behind an encoder that were the first ones of a projector: where SimCLR v2 starts its fine-tuning.

Catalog: simclr_v2_finetune. A job with ``train.init_from`` and ``backbone.tail`` is that procedure.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from armillary.components.heads import Projector


class Tail(nn.Sequential):
    """Linear without bias, batch norm, ReLU: the hidden layers of a :class:`~armillary.components.heads.Projector`.

    ``sigma(BN(W_1 h))`` of Chen et al., "Big Self-Supervised Models are Strong Semi-Supervised Learners", NeurIPS 2020,
    section 2, equation 2, for one layer. Parameters have the names that they have in a projector.

    Args:
        in_features: width of the embedding in front.
        widths: of the layers.
    """

    def __init__(self, in_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        before = in_features
        for number, width in enumerate(widths, 1):
            for name, layer in list(Projector(before, width, 2).named_children())[:3]:
                self.add_module(f"{name.rstrip('1')}{number}", layer)
            before = width


class TailedEncoder(nn.Module):
    """An encoder and a tail, as one encoder; it has neither feature maps nor tokens.

    Args:
        encoder: from images to embeddings.
        embedding_dim: their width.
        widths: of the tail's layers.
    """

    def __init__(self, encoder: nn.Module, embedding_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.tail = encoder, Tail(embedding_dim, widths)
        self.any_size = getattr(encoder, "any_size", False)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` in [0, 1] to ``(batch, widths[-1])``."""
        features: Tensor = self.tail(self.encoder(images))
        return features
