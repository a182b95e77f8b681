"""Objectives on interactions: who chose what."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary import collectives
from armillary.components.counter import key, normals, sample_keys, uniforms
from armillary.components.recommendation import Disturb, same_orthant_noise
from armillary.losses.info_nce import InfoNCE
from armillary.losses.recommendation import BPR
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register
from armillary.spec.errors import UserError

_NOISE = 94


@register
class SimGCL(Objective):
    """SimGCL: recommendation on a graph of users and items, with two noisy copies of its embeddings told apart.

    ``L = BPR + lam (L_users + L_items) + l2 R``, ``L_users = mean_i -log exp(cos(z'_i, z''_i)/tau) / sum_j
    exp(cos(z'_i, z''_j)/tau)`` over the distinct users of the global batch, and the same over its distinct chosen
    items. z' and z'' are what LightGCN gives when every layer's output is moved by a vector of length epsilon into its
    own orthant, ``e + epsilon sign(e) * u/|u|, u ~ U(0, 1)``, drawn anew for every node, layer and view. BPR reads the
    embeddings without noise. R is the mean over triples of the squared length of the three untouched table rows.

    Certain, up to means or sums: the first released code sums BPR and both contrasts, the later one averages
    (``reduction``), and both regularise the batch's rows where the paper writes the whole table. ``lam = 0`` is
    LightGCN trained with BPR. A survey moves the final embeddings by Gaussian noise once and recommends nothing
    (``formulation: survey``): its contrast alone does not know who chose what, but for the graph.
    """

    name = "simgcl"
    family = "graph"
    catalog_id = "simgcl"
    citation = Citation(
        "Junliang Yu, Hongzhi Yin, Xin Xia, Tong Chen, Lizhen Cui, Quoc Viet Hung Nguyen",
        "Are Graph Augmentations Necessary? Simple Graph Contrastive Learning for Recommendation",
        2022,
        "SIGIR",
        "https://arxiv.org/abs/2112.08679",
    )
    needs = Needs(recipe="none", modality="interactions", batch_coupled=True)
    convergence = Convergence(
        dataset="tastes",
        metric="recommendation/ndcg_at_20",
        margin=0.03,
        job={
            "data.split": "sample",
            "data.image_size": None,
            "optimizer.lr": 0.01,
            "train.batch_size": 512,
            "train.epochs": 20,
            "objective.lam": 0.01,
        },
    )

    class Hyperparameters(base.Hyperparameters):
        """Symbols of the paper; layers and width are the backbone's."""

        epsilon: float = Field(0.1, ge=0, le=10, description="length of the noise vectors")
        tau: float = Field(0.2, gt=0, le=10, description="temperature")
        lam: float = Field(0.5, ge=0, le=100, description="weight of the contrast; 0: LightGCN with BPR")
        l2: float = Field(1e-4, ge=0, le=1, description="weight of the squared table rows")
        reduction: Literal["mean", "sum"] = Field("mean", description="over triples and over nodes")
        formulation: Literal["paper", "survey"] = Field("paper", description="survey: Gaussian noise, no BPR")

    def build(self, context: BuildContext) -> None:
        """Makes the losses; the encoder must be a graph of users and items."""
        if not hasattr(context.encoder, "nodes"):
            raise UserError("simgcl reads all nodes of a graph", key="backbone", allowed="lightgcn, without a tail")
        options = self.hyperparameters
        self.seed = context.seed
        self.ranking = BPR(reduction="none")
        # Every worker computes the whole contrast, as it has all embeddings: nothing to gather.
        self.contrast = InfoNCE(options.tau, reduction="none", gather=False)

    def forward(self, batch: Batch) -> Output:
        """The loss of this worker's triples, and of the nodes of all workers' triples."""
        options, ids = self.hyperparameters, batch.views[0]
        graph: Any = self.encoder
        clean = graph.nodes()
        survey = options.formulation == "survey"
        if survey:
            views = [clean + self._gaussian(clean, view) for view in range(2)]
        else:
            views = [graph.nodes(self._noise(view)) if options.lam else clean for view in range(2)]
        metrics: dict[str, Tensor] = {}
        ranking = self._reduce(self.ranking(*clean[ids.T], metrics=metrics))
        contrast = sum(self._contrast(views, nodes) for nodes in self._nodes(ids))
        metrics |= {"ranking": ranking.detach(), "contrast": torch.as_tensor(contrast).detach()}
        if survey:
            return Output(torch.as_tensor(contrast), metrics)
        rows = self._reduce(graph.table(ids).square().sum(dim=(1, 2)))
        return Output(ranking + options.lam * contrast + options.l2 * rows, metrics)

    def _nodes(self, ids: Tensor) -> list[Tensor]:
        """The distinct users and the distinct chosen items of the global batch."""
        everyone = collectives.gather_no_grad(ids)
        return [torch.unique(everyone[:, column]) for column in range(2)]

    def _contrast(self, views: list[Tensor], nodes: Tensor) -> Tensor:
        losses: Tensor = self.contrast(views[0][nodes], views[1][nodes])
        return losses.mean() if self.hyperparameters.reduction == "mean" else losses.sum()

    def _reduce(self, losses: Tensor) -> Tensor:
        """What triples add up to, so that the mean over workers is that of the global batch."""
        if self.hyperparameters.reduction == "mean":
            return losses.mean()
        total: Tensor = losses.sum() * collectives.world_size()
        return total

    def _noise(self, view: int) -> Disturb:
        def disturb(embeddings: Tensor, layer: int) -> Tensor:
            drawn = uniforms(self._keys(embeddings, view, layer), embeddings.shape[1])
            return same_orthant_noise(embeddings, drawn.to(embeddings.dtype), self.hyperparameters.epsilon)

        return disturb

    def _gaussian(self, embeddings: Tensor, view: int) -> Tensor:
        drawn = normals(self._keys(embeddings, view, 0), embeddings.shape[1])
        noise: Tensor = self.hyperparameters.epsilon * drawn.to(embeddings.dtype)
        return noise

    def _keys(self, embeddings: Tensor, view: int, layer: int) -> Tensor:
        nodes = torch.arange(len(embeddings), device=embeddings.device)
        return sample_keys(key(_NOISE, self.seed, self.step, view, layer), nodes)
