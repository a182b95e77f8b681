"""A decoder that looks at an image's tokens from real coordinates, by rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.components.patches import rotate_by_position


class RotaryDecoder(nn.Module):
    """Queries at places of an image, answered from its tokens: layers of cross-attention and perceptron.

    ``Q = R(x, y) W_q m``, ``K = R(.) W_k h``, ``V = W_v h``, with R the rotation of
    :func:`~armillary.components.patches.rotate_by_position`, so that attention depends on where a query lies relative
    to a token; places are real numbers and may lie outside the image. m is one learned vector.

    Args:
        dim: width of the tokens, a multiple of 4.
        depth: layers, at least 1.
        base: of the rotation's frequencies, for coordinates in patches.
    """

    def __init__(self, dim: int, depth: int = 2, base: float = 100.0) -> None:
        super().__init__()
        self.query = QueryToken(dim)
        self.layers = nn.ModuleList(_RotaryLayer(dim, base) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        """What is expected at the wanted places.

        Args:
            tokens: ``(batch, T, dim)``.
            places: ``(T, 2)`` or ``(batch, T, 2)``, where they lie, x then y.
            wanted: ``(batch, Q, 2)``.

        Returns:
            ``(batch, Q, dim)``.
        """
        hidden = self.query(tuple(wanted.shape[:2]), tokens)
        for layer in self.layers:
            hidden = layer(hidden, tokens, places, wanted)
        predicted: Tensor = self.predict(self.norm(hidden))
        return predicted


class QueryToken(nn.Module):
    """One learned vector in many places.

    Args:
        dim: its width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The vector as ``(*shape, dim)``, of the type of ``like``."""
        return self.token.to(like.dtype).expand(*shape, -1)


class _RotaryLayer(nn.Module):
    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        # Heads of 32 channels; rotation needs a multiple of 4 in each.
        self.heads, self.base = (dim // 32 if dim % 32 == 0 else 1), base
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.ask, self.tell = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, hidden: Tensor, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        query = self._rotated(self.ask(self.norm1(hidden)), wanted)
        keys, values = self.tell(tokens).chunk(2, dim=-1)
        answer = F.scaled_dot_product_attention(query, self._rotated(keys, places), self._by_head(values))
        hidden = hidden + self.out(answer.transpose(1, 2).flatten(2))
        result: Tensor = hidden + self.mlp(self.norm2(hidden))
        return result

    def _by_head(self, vectors: Tensor) -> Tensor:
        """``(batch, n, dim)`` as ``(batch, heads, n, dim / heads)``."""
        split: Tensor = vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split

    def _rotated(self, vectors: Tensor, places: Tensor) -> Tensor:
        return rotate_by_position(self._by_head(vectors), places.unsqueeze(-3), self.base)
