"""An image encoder and a text encoder that embed into one space."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from armillary.components.text import TextTransformer


class TwoTowers(nn.Module):
    """What is evaluated and kept of a method on images and texts: to the outside it is the image encoder.

    Args:
        image: images to ``(batch, dim)``.
        text: token ids to ``(batch, dim)``.
    """

    def __init__(self, image: nn.Module, text: TextTransformer) -> None:
        super().__init__()
        self.image, self.text = image, text

    @property
    def text_options(self) -> dict[str, Any]:
        """What :class:`~armillary.components.text.TextTransformer` was made with, to be kept beside the weights."""
        return self.text.options

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(batch, channels, height, width)`` in [0, 1]."""
        return self.image(images)  # type: ignore[no-any-return]
