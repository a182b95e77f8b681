"""A small network that sharpens enlarged images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sharpener(nn.Module):
    """Adds what an enlarged image lacks: a few convolutions whose output is added to their input.

    No batch norm, which would make the tone of an image depend on the others. The last layer starts at a tenth of its
    usual size, so that training begins near the enlarged image.

    Args:
        channels: of the images.
        width: of the layers between.
        layers: convolutions, at least 2; each sees one pixel further.
    """

    def __init__(self, channels: int, width: int = 32, layers: int = 5) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"layers must be at least 2, found {layers}")
        body: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        for _ in range(layers - 2):
            body += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        last = nn.Conv2d(width, channels, 3, padding=1)
        with torch.no_grad():
            last.weight.mul_(0.1)
        self.body = nn.Sequential(*body, last)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, channels, height, width)`` in [0, 1]; the result may leave that range a little."""
        sharpened: Tensor = images + self.body(2 * images - 1)
        return sharpened
