"""Self-paced contrast with a memory of classes, clusters and single images."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from armillary.collectives import gather_no_grad
from armillary.components.bank import MemoryBank, encode_all
from armillary.components.held import Held
from armillary.components.self_paced import Criterion, clusters_at, jaccard_distance, trusted
from armillary.losses.hybrid_memory import HybridMemoryLoss
from armillary.losses.tensors import normalize, widen
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output, Samples
from armillary.objectives.base import Hyperparameters as Base
from armillary.objectives.registry import register


@register
class SpCL(Objective):
    """SpCL: images contrast with labelled classes, trusted clusters and single images, which a memory holds.

    Equation and shapes: :class:`armillary.losses.hybrid_memory.HybridMemoryLoss`. The first ``labelled_share`` of the
    classes are the source domain, with labels; of all other images the label is not used. 0 is the paper's unsupervised
    form. Before every epoch the unlabelled rows of the memory are clustered by DBSCAN on the Jaccard distance of their
    neighbourhoods, and clusters that do not hold under a smaller and a larger radius fall apart
    (:mod:`armillary.components.self_paced`). Source and target share batch norm, which the paper keeps apart, and
    batches are drawn at random where the authors' sampler takes several images of each pseudo-class.
    """

    name = "spcl"
    family = "contrastive_supervised"
    catalog_id = "spcl"
    citation = Citation(
        "Yixiao Ge, Feng Zhu, Dapeng Chen, Rui Zhao, Hongsheng Li",
        "Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.02713",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("bank", "clustering"))
    convergence = Convergence(
        job={"objective.k1": 8, "objective.k2": 3, "objective.min_samples": 2, "objective.temperature": 0.1}
    )

    centres: Tensor
    group: Tensor
    independence: Tensor

    class Hyperparameters(Base):
        """Memory, clusters, labels."""

        temperature: float = Field(0.05, ge=0.005, le=10, description="divides the cosines")
        memory_momentum: float = Field(0.2, ge=0, lt=1, description="share of the old row that the memory keeps")
        bank_host: bool = Field(False, description="keep the bank in main memory; costs a copy a step")
        labelled_share: float = Field(0.5, ge=0, le=1, description="share of the classes whose labels are known")
        eps: float = Field(0.6, gt=0, le=1, description="DBSCAN's radius, a Jaccard distance")
        eps_gap: float = Field(0.02, ge=0, le=0.3, description="what the tight and the loose radius differ by")
        min_samples: int = Field(4, ge=1, le=100, description="samples within the radius that make a core")
        k1: int = Field(30, ge=1, le=1000, description="size of neighbourhoods")
        k2: int = Field(6, ge=1, le=1000, description="neighbours whose neighbourhoods are averaged")

    def build(self, context: BuildContext) -> None:
        """Makes memory, centres and loss; at first every image is a group of its own."""
        options = self.hyperparameters
        self.classes = round(options.labelled_share * context.num_classes)
        self.loss = HybridMemoryLoss(options.temperature)
        self.bank = MemoryBank(context.dataset_size, (context.embedding_dim,), host=options.bank_host)
        self.register_buffer("centres", normalize(torch.randn(self.classes, context.embedding_dim)))
        self.register_buffer("group", torch.arange(context.dataset_size))
        # Of the first epoch's clusters nine tenths pass; the threshold then stays. Below 0: not set yet.
        self.register_buffer("independence", torch.tensor(-1.0, dtype=torch.float64))
        self._held = Held()

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Fills the memory at the start, then clusters the unlabelled images anew."""
        if epoch == 0:
            self._fill(samples)
        unlabelled = (self.group >= 0).nonzero()[:, 0]
        if not len(unlabelled):
            return
        options = self.hyperparameters
        rows = self.bank.rows[unlabelled]
        distance = jaccard_distance(rows, min(options.k1, len(rows) - 1), options.k2)
        found = clusters_at(distance, Criterion(options.eps, options.eps_gap, options.min_samples))
        known = float(self.independence)
        groups, independence = trusted(*found, known if known >= 0 else None)
        self.group[unlabelled] = groups
        self.independence.fill_(independence)

    @torch.no_grad()
    def _fill(self, samples: Samples) -> None:
        def encode(batch: Batch) -> Tensor:
            unit = normalize(widen(self.encoder(batch.views[0])))
            return torch.cat([unit, batch.label[:, None].to(unit.dtype)], dim=1)

        rows, seen = encode_all(samples(), encode, len(self.group), self.encoder)
        label = rows[:, -1].round().long()
        self.bank.refresh(normalize(rows[:, :-1]), seen)
        source = seen & (label < self.classes)
        self.group.copy_(torch.where(seen & ~source, torch.arange(len(seen), device=seen.device), -1))
        total = torch.zeros_like(self.centres).index_add_(0, label[source], rows[source, :-1].to(self.centres.dtype))
        there = torch.bincount(label[source], minlength=self.classes) > 0
        self.centres.copy_(torch.where(there[:, None], normalize(total), self.centres))

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view against the memory as it was before the step."""
        metrics: dict[str, Tensor] = {}
        embeddings = self.encoder(batch.views[0])
        source = batch.label < self.classes
        positive = torch.where(source, batch.label, self.classes + self.group[batch.index])
        loss = self.loss(embeddings, positive, self.centres, self.bank.rows, self.group, metrics=metrics)
        self._held.add(self.step, rows=normalize(widen(embeddings.detach())), label=batch.label, index=batch.index)
        return Output(loss, metrics)

    def after_step(self, step: int) -> None:
        """Moves the rows of the step's unlabelled images, and the centres of its labelled classes."""
        held: dict[str, Any] = {name: gather_no_grad(value) for name, value in self._held.take().items()}
        if not held:
            return
        source = held["label"] < self.classes
        self.bank.mix(held["index"][~source], held["rows"][~source], self.hyperparameters.memory_momentum)
        self._move_centres(held["label"][source], held["rows"][source])

    @torch.no_grad()
    def _move_centres(self, label: Tensor, rows: Tensor) -> None:
        total = torch.zeros_like(self.centres).index_add_(0, label, rows.to(self.centres.dtype))
        count = torch.bincount(label, minlength=self.classes)[:, None]
        mean = total / count.clamp_min(1)
        moved = normalize(torch.lerp(mean, self.centres, self.hyperparameters.memory_momentum))
        self.centres.copy_(torch.where(count > 0, moved, self.centres))
