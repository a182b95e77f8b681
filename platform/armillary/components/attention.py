"""What a vision transformer looks at: the attention of its class token in the last layer, and the patches it picks out.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), 2021, figure 1 and section 4.2.2
(the study dino_attention).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.components.transformers import TransformerEncoder


@torch.no_grad()
def class_attention(encoder: TransformerEncoder, images: Tensor) -> Tensor:
    """Attention of the class token to each patch in the last layer, before what falls on other tokens is left out.

    Args:
        encoder: a transformer.
        images: ``(batch, channels, height, width)`` in [0, 1]; patches divide their sides.

    Returns:
        ``(batch, heads, rows, columns)`` float32; each head's sum over patches is at most 1.
    """
    blocks: Any = encoder.body.blocks
    attention = blocks[-1].attn
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        encoder.tokens(images)
    finally:
        hook.remove()
    grid = (images.shape[2] // encoder.patch_size[0], images.shape[3] // encoder.patch_size[1])
    weights: Tensor = class_weights(attention, seen[0])[:, :, encoder.body.prefix :].unflatten(2, grid)
    return weights


def class_weights(attention: nn.Module, hidden: Tensor) -> Tensor:
    """``softmax_p(q_cls . k_p / sqrt d)`` over the tokens ``hidden (batch, tokens, dim)``: ``(batch, heads, tokens)``.

    In float32, from timm's attention module.
    """
    part: Any = attention
    with torch.autocast(hidden.device.type, enabled=False):
        # (batch, tokens, 3 heads d) to 3 x (batch, heads, tokens, d)
        joined = part.qkv(hidden.to(part.qkv.weight.dtype)).unflatten(2, (3, part.num_heads, -1))
        query, keys = (joined[:, :, number].transpose(1, 2).float() for number in (0, 1))
        query, keys = part.q_norm(query), part.k_norm(keys)
        scores = (query[:, :, :1] * query.shape[-1] ** -0.5) @ keys.transpose(2, 3)
        weights: Tensor = scores[:, :, 0].softmax(dim=-1)
    return weights


def heaviest_patches(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that hold a share of each head's attention.

    Args:
        attention: ``(batch, heads, rows, columns)``, not negative.
        mass: the share, in [0, 1]; 1 keeps every patch that gets any attention.

    Returns:
        bool, as ``attention``.
    """
    flat = attention.flatten(2)
    values, order = flat.sort(dim=2, descending=True, stable=True)
    share = values / values.sum(dim=2, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    # A patch is needed while those before it do not hold the mass yet.
    needed = (share.cumsum(dim=2) - share < mass) & (values > 0)
    return torch.zeros_like(needed).scatter_(2, order, needed).view_as(attention)


def jaccard(found: Tensor, truth: Tensor) -> Tensor:
    """The best head's overlap with an object, ``|M and G| / |M or G|``, ``(batch,)`` in [0, 1]; 0 where both are empty.

    Args:
        found: bool ``(batch, heads, rows, columns)``.
        truth: bool ``(batch, rows, columns)``.
    """
    wanted = truth[:, None]
    both, either = (found & wanted).sum(dim=(2, 3)), (found | wanted).sum(dim=(2, 3))
    return (both / either.clamp_min(1)).amax(dim=1)


@torch.no_grad()
def attention_pictures(encoder: TransformerEncoder, images: Tensor, mass: float = 0.6) -> Tensor:
    """Rows of an image, each head's attention over it, and the image where the mean of the heads holds ``mass``.

    Args:
        encoder: a transformer.
        images: ``(n, channels, height, width)`` in [0, 1].
        mass: see :func:`heaviest_patches`.

    Returns:
        ``(n, 2 + heads, channels, height, width)`` in [0, 1].
    """
    size, channels = images.shape[2:], images.shape[1]
    attention = class_attention(encoder, images)
    bright = attention / attention.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    maps = F.interpolate(bright, size=size, mode="bilinear").clamp(0, 1)
    kept = heaviest_patches(attention.mean(dim=1, keepdim=True), mass).float()
    picked = images * F.interpolate(kept, size=size, mode="nearest")
    heads = maps[:, :, None].expand(-1, -1, channels, -1, -1)
    return torch.cat([images[:, None], heads.to(images.dtype), picked[:, None]], dim=1)
