"""LightGCN: vectors of users and items, averaged along the graph of who chose what."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armillary.losses.tensors import widen

# (embeddings of all nodes, layer from 0) -> changed embeddings.
Disturb = Callable[[Tensor, int], Tensor]


class _Propagate(torch.autograd.Function):
    """``A x`` for a constant symmetric sparse A, whose gradient is ``A g``."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(adjacency)
        product: Tensor = torch.sparse.mm(adjacency, values)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.sparse.mm(ctx.saved_tensors[0], gradient)


class LightGCN(nn.Module):
    """Light graph convolution (He et al., SIGIR 2020) on the bipartite graph of users and items.

    ``E_k = D^-1/2 A D^-1/2 E_{k-1}``; a node's embedding is the mean of layers 1..K, and of layer 0 too where ``ego``
    says so, as in the first paper; SimGCL leaves it out. A node without an edge has embedding 0 in layers 1..K.

    The graph is part of the state, so that a stored encoder needs nothing else.

    Args:
        nodes: users and items together; users are numbered first.
        users: how many of them are users.
        edges: pairs of a user and an item, each counted once.
        embedding_dim: width of the vectors.
        layers: K, at least 1.
        ego: whether layer 0 belongs to the mean.
    """

    start: Tensor
    neighbour: Tensor

    def __init__(
        self, nodes: int, users: int, edges: int, embedding_dim: int, layers: int = 3, ego: bool = False
    ) -> None:
        super().__init__()
        self.users, self.layers, self.ego = users, layers, ego
        self.table = nn.Embedding(nodes, embedding_dim)
        nn.init.xavier_uniform_(self.table.weight)
        # The neighbours of node n are neighbour[start[n]:start[n + 1]].
        self.register_buffer("start", torch.zeros(nodes + 1, dtype=torch.int64))
        self.register_buffer("neighbour", torch.zeros(2 * edges, dtype=torch.int64))

    @torch.no_grad()
    def connect(self, edges: Tensor) -> None:
        """Sets the graph.

        Args:
            edges: ``(2, E)`` int64, a user's and an item's node; no pair twice.

        Raises:
            ValueError: E is not the number that the encoder was made for, or a number is no node.
        """
        nodes = len(self.start) - 1
        if edges.shape != (2, len(self.neighbour) // 2):
            raise ValueError(f"edges must be (2, {len(self.neighbour) // 2}), found {tuple(edges.shape)}")
        if edges.numel() and not (int(edges.min()) >= 0 and int(edges.max()) < nodes):
            raise ValueError(f"edges join nodes 0..{nodes - 1}")
        source, target = torch.cat([edges, edges.flip(0)], dim=1)
        order = torch.argsort(source * nodes + target)
        self.neighbour.copy_(target[order])
        self.start[1:] = torch.bincount(source, minlength=nodes).cumsum(0)

    def nodes(self, disturb: Disturb | None = None) -> Tensor:
        """The embeddings of all nodes, ``(nodes, embedding_dim)``.

        Args:
            disturb: changes what a layer gives before the next one takes it.
        """
        device = self.start.device
        # Sparse products exist in float32, and sums over many neighbours want it.
        with torch.autocast(device.type, enabled=False):
            hidden = widen(self.table(torch.arange(len(self.start) - 1, device=device)))
            adjacency = self._adjacency(hidden.dtype)
            kept = [hidden] if self.ego else []
            for layer in range(self.layers):
                hidden = _Propagate.apply(adjacency, hidden)
                if disturb is not None:
                    hidden = disturb(hidden, layer)
                kept.append(hidden)
            return torch.stack(kept).mean(dim=0)

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings ``(batch, embedding_dim)`` of the nodes in the first column of ``ids (batch, n)``."""
        embeddings: Tensor = self.nodes()
        return embeddings[ids[:, 0]]

    def _adjacency(self, dtype: torch.dtype) -> Tensor:
        degree = self.start.diff()
        source = torch.repeat_interleave(torch.arange(len(degree), device=degree.device), degree)
        scale = degree.clamp_min(1).to(dtype).rsqrt()
        neighbour = self.neighbour[: len(source)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            # The graph is kept as compressed rows, and torch multiplies those faster than coordinates.
            adjacency: Tensor = torch.sparse_csr_tensor(
                self.start,
                neighbour,
                scale[source] * scale[neighbour],
                (len(degree), len(degree)),
                check_invariants=False,
            )
        return adjacency


def same_orthant_noise(embeddings: Tensor, uniform: Tensor, epsilon: float) -> Tensor:
    """Embeddings moved by ``epsilon`` into their own orthant: ``e + epsilon sign(e) * u / |u|``.

    Args:
        embeddings: ``(n, dim)``; a coordinate that is exactly 0 stays.
        uniform: ``(n, dim)`` numbers in [0, 1).
        epsilon: length of the move.
    """
    length = torch.linalg.vector_norm(uniform, dim=1, keepdim=True)
    step: Tensor = epsilon * embeddings.detach().sign() * (uniform / length.clamp_min(1e-12))
    return embeddings + step
