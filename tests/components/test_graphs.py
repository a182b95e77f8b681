"""Graphs as pictures, and the graph isomorphism network beside torch-geometric's layers."""

from __future__ import annotations

import pytest
import torch

from armillary.components.graphs import GIN, Graphs, pack

SIZES, NODES, FEATURES = (5, 9, 1, 7), 9, 3


def some_graphs() -> Graphs:
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(NODES) < torch.tensor(SIZES)[:, None]
    linked = (torch.rand(len(SIZES), NODES, NODES, generator=draw, dtype=torch.float64) < 0.3).double().triu(1)
    both = (linked + linked.transpose(1, 2)) * mask[:, :, None] * mask[:, None, :]
    features = torch.rand(len(SIZES), NODES, FEATURES, generator=draw, dtype=torch.float64) * mask[..., None]
    return Graphs(mask, features, both)


@pytest.mark.parity
def test_gin_agrees_with_torch_geometric() -> None:
    """The same weights over ragged graphs in a list, edges and all, give the same embeddings and gradients."""
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    ours, graphs = GIN(FEATURES, 6, width=8, depth=3).double(), some_graphs()
    with torch.no_grad():
        ours.eps.copy_(torch.tensor([0.3, -0.2, 0.1]))
    layers = []
    for number, body in enumerate(ours.layers):
        layer = geometric.GINConv(body, train_eps=True).double()
        with torch.no_grad():
            layer.eps.fill_(float(ours.eps[number]))
        layers.append(layer)
    owner = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    begins = torch.tensor(SIZES).cumsum(0) - torch.tensor(SIZES)
    graph, first, second = graphs.adjacency.nonzero().T
    edges = torch.stack([first, second]) + begins[graph]
    hidden, sums = graphs.features[graphs.mask], []
    for layer in layers:
        # GINConv leaves the ReLU after its network to the caller; ours ends the network, and relu(relu(x)) is relu(x).
        hidden = layer(hidden, edges).relu()
        sums.append(geometric.global_add_pool(hidden, owner))
    expected = ours.neck(torch.cat(sums, dim=1))
    found = ours(pack(graphs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = [parameter for name, parameter in ours.named_parameters() if name != "eps"]
    mine, theirs = (torch.autograd.grad(value.square().sum(), weights) for value in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    eps = torch.autograd.grad(ours(pack(graphs)).square().sum(), ours.eps)[0]
    again = torch.autograd.grad(expected_of(ours, layers, graphs, edges, owner), [layer.eps for layer in layers])
    torch.testing.assert_close(eps, torch.cat([value.reshape(1) for value in again]), rtol=1e-10, atol=1e-10)


def expected_of(
    ours: GIN, layers: list[torch.nn.Module], graphs: Graphs, edges: torch.Tensor, owner: torch.Tensor
) -> torch.Tensor:
    hidden, sums = graphs.features[graphs.mask], []
    for layer in layers:
        hidden = layer(hidden, edges).relu()
        sums.append(torch.stack([hidden[owner == number].sum(dim=0) for number in range(len(SIZES))]))
    squares: torch.Tensor = ours.neck(torch.cat(sums, dim=1)).square().sum()
    return squares


def test_an_embedding_does_not_know_the_order_of_nodes_or_the_padding() -> None:
    torch.manual_seed(0)
    network, graphs = GIN(FEATURES, 6, width=8).double(), some_graphs()
    order = torch.randperm(NODES)
    turned = Graphs(graphs.mask[:, order], graphs.features[:, order], graphs.adjacency[:, order][:, :, order])
    torch.testing.assert_close(network(pack(turned)), network(pack(graphs)))
    wider = Graphs(*(torch.nn.functional.pad(part, pad) for part, pad in zip(graphs, PADDING, strict=True)))
    torch.testing.assert_close(network(pack(wider)), network(pack(graphs)))


PADDING = ((0, 4), (0, 0, 0, 4), (0, 4, 0, 4))
