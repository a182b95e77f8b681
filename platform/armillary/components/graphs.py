"""Small graphs, packed densely: their pictures, random changes of them, and the graph isomorphism network.

A graph of at most N nodes with F features is a picture of one channel, N rows and ``1 + F + N`` columns: a row a node;
the first column says whether there is such a node, the next F are its features, the last N its row of the symmetric
adjacency matrix, all in [0, 1]. So graphs are stored, batched and dealt out as images are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from armillary.components.counter import integers, uniforms


class Graphs(NamedTuple):
    """``mask (batch, N)`` bool, ``features (batch, N, F)``, ``adjacency (batch, N, N)``."""

    mask: Tensor
    features: Tensor
    adjacency: Tensor

    def keep(self, nodes: Tensor) -> Graphs:
        """Only the nodes where ``nodes (batch, N)`` is true, and the edges between them."""
        mask = self.mask & nodes
        kept = mask.to(self.features.dtype)
        return Graphs(mask, self.features * kept[..., None], self.adjacency * kept[:, :, None] * kept[:, None, :])


def unpack(pictures: Tensor) -> Graphs:
    """Pictures ``(batch, 1, N, 1 + F + N)`` as graphs."""
    rows = pictures[:, 0]
    nodes = rows.shape[1]
    return Graphs(rows[:, :, 0] > 0.5, rows[:, :, 1:-nodes], rows[:, :, -nodes:])


def pack(graphs: Graphs) -> Tensor:
    """Graphs as pictures ``(batch, 1, N, 1 + F + N)``."""
    mask = graphs.mask[..., None].to(graphs.features.dtype)
    return torch.cat([mask, graphs.features, graphs.adjacency], dim=2)[:, None]


def lowest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Where the ``count (batch,)`` smallest of ``values (batch, n)`` are, of those that are ``among (batch, n)``."""
    rank = values.masked_fill(~among, torch.inf).argsort(dim=1).argsort(dim=1)
    return among & (rank < count[:, None])


def drop_nodes(graphs: Graphs, keys: Tensor, ratio: float) -> Graphs:
    """Leaves out that share of the nodes, rounded down, and their edges."""
    count = (ratio * graphs.mask.sum(dim=1)).long()
    return graphs.keep(~lowest(uniforms(keys, graphs.mask.shape[1]), graphs.mask, count))


def perturb_edges(graphs: Graphs, keys: Tensor, ratio: float) -> Graphs:
    """Removes that share of the edges, rounded down, and joins as many other pairs of nodes with weight 1."""
    nodes = graphs.mask.shape[1]
    row, column = torch.triu_indices(nodes, nodes, offset=1, device=keys.device)
    weights = graphs.adjacency[:, row, column]
    possible = graphs.mask[:, row] & graphs.mask[:, column]
    drawn, there = uniforms(keys, len(row)), weights > 0
    count = (ratio * there.sum(dim=1)).long()
    weights = weights.masked_fill(lowest(drawn, there, count), 0)
    weights = weights.masked_fill(lowest(drawn, possible & ~there, count), 1)
    adjacency = torch.zeros_like(graphs.adjacency)
    adjacency[:, row, column] = weights
    diagonal = torch.diag_embed(graphs.adjacency.diagonal(dim1=1, dim2=2))
    return graphs._replace(adjacency=adjacency + adjacency.transpose(1, 2) + diagonal)


def mask_attributes(graphs: Graphs, keys: Tensor, ratio: float) -> Graphs:
    """Sets the features of that share of the nodes, rounded down, to 0."""
    count = (ratio * graphs.mask.sum(dim=1)).long()
    hidden = lowest(uniforms(keys, graphs.mask.shape[1]), graphs.mask, count)
    return graphs._replace(features=graphs.features.masked_fill(hidden[..., None], 0))


def walk_subgraph(graphs: Graphs, keys: Tensor, ratio: float) -> Graphs:
    """Keeps ``1 - ratio`` of the nodes, rounded up: a random one, then random neighbours of what is kept already.

    Where the part that hangs together is smaller, all of it is kept.
    """
    nodes = graphs.mask.shape[1]
    wanted = graphs.mask.sum(dim=1) - (ratio * graphs.mask.sum(dim=1)).long()
    drawn = uniforms(keys, nodes * (nodes + 1)).view(-1, nodes + 1, nodes)
    kept = lowest(drawn[:, 0], graphs.mask, torch.ones_like(wanted))
    linked = graphs.adjacency > 0
    for step in range(1, nodes):
        beside = (linked & kept[:, :, None]).any(dim=1) & ~kept & graphs.mask
        more = (kept.sum(dim=1) < wanted).long()
        kept = kept | lowest(drawn[:, step], beside, more)
    return graphs.keep(kept)


AUGMENTATIONS = {
    "node_drop": drop_nodes,
    "edge_perturbation": perturb_edges,
    "attribute_mask": mask_attributes,
    "subgraph": walk_subgraph,
}


def augment(pictures: Tensor, keys: Tensor, name: str, ratio: float) -> Tensor:
    """A random change of each graph.

    Args:
        pictures: ``(batch, 1, N, 1 + F + N)``.
        keys: ``(batch,)`` int64; the change is a function of them.
        name: a key of :data:`AUGMENTATIONS`; ``random`` picks one for each graph.
        ratio: share of nodes or edges that change.
    """
    graphs = unpack(pictures)
    if name != "random":
        return pack(AUGMENTATIONS[name](graphs, keys, ratio))
    each = torch.stack([pack(change(graphs, keys, ratio)) for change in AUGMENTATIONS.values()])
    return each[integers(keys, 1, len(AUGMENTATIONS))[:, 0], torch.arange(len(pictures), device=pictures.device)]


class GIN(nn.Module):
    """Graph isomorphism network (Xu et al., ICLR 2019): sums over neighbours, sums over nodes, all layers read out.

    ``h_v <- MLP((1 + eps) h_v + sum_u A_vu h_u)`` with learned eps; the embedding is a linear map of the concatenated
    sums of every layer's nodes. Layer norm takes the place of the batch norm, which would see the padding.

    Args:
        features: F.
        embedding_dim: width of the embedding.
        width: of the nodes' vectors.
        depth: layers.
    """

    def __init__(self, features: int, embedding_dim: int, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        widths = [features, *[width] * depth]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(before, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            for before in widths[:-1]
        )
        self.eps = nn.Parameter(torch.zeros(depth))
        self.neck = nn.Linear(width * depth, embedding_dim)

    def by_depth(self) -> list[list[nn.Parameter]]:
        """Layer by layer; see :class:`~armillary.components.encoders.LayeredEncoder`. All eps count to the first."""
        layers = [list(layer.parameters()) for layer in self.layers]
        return [[self.eps, *layers[0]], *layers[1:]]

    def forward(self, pictures: Tensor) -> Tensor:
        """Embeds graphs' pictures ``(batch, 1, N, 1 + F + N)`` as ``(batch, embedding_dim)``."""
        mask, hidden, adjacency = unpack(pictures)
        kept, sums = mask[..., None].to(pictures.dtype), []
        for number, layer in enumerate(self.layers):
            hidden = layer((1 + self.eps[number]) * hidden + adjacency.to(hidden.dtype) @ hidden) * kept
            sums.append(hidden.sum(dim=1))
        embedding: Tensor = self.neck(torch.cat(sums, dim=1))
        return embedding
