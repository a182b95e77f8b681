"""From images to embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from armillary.components.modes import evaluating

if TYPE_CHECKING:
    from armillary.data.splits import Images


def extract(
    encoder: nn.Module,
    images: Images,
    *,
    batch_size: int = 256,
    flip: bool = False,
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bf16"] = "float32",
) -> Tensor:
    """Embeds images with the encoder in evaluation mode and without gradients.

    Args:
        encoder: maps ``(batch, C, H, W)`` in [0, 1] to ``(batch, D)``; it must be on ``device``. Each of its modules
            leaves in the mode (training or evaluation) it came in.
        images: uint8 ``(N, C, H, W)``, N >= 1, on any device, or in the store: taken batch by batch. Rows of ids
            (:class:`armillary.data.ids.IdRows`) reach the encoder as they are.
        batch_size: images at a time.
        flip: gives the mean of the embedding and that of the mirrored image.
        device: where the encoder computes.
        precision: ``bf16`` runs the encoder under autocast.

    Returns:
        ``(N, D)`` float32 on the CPU, not normalised.

    Raises:
        ValueError: the images are not uint8 ``(N, C, H, W)``, or there is none.
    """
    from armillary.data.loader import in_order

    if images.dtype not in (torch.uint8, torch.int64) or images.ndim != 4 or not len(images):
        raise ValueError(f"images must be uint8 (N, C, H, W) with N >= 1, found {images.dtype} {tuple(images.shape)}")
    device = torch.device(device)
    parts = []
    with (
        evaluating(encoder),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for part in in_order(images, torch.arange(len(images)).split(batch_size)):
            batch = part.to(device)
            if batch.dtype == torch.uint8:
                batch = batch.float() / 255.0
            embedding = encoder(batch).float()
            if flip and images.dtype == torch.uint8:
                embedding = (embedding + encoder(batch.flip(-1)).float()) / 2
            parts.append(embedding.cpu())
    return torch.cat(parts)
