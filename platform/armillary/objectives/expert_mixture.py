"""A mixture of experts, one a cluster, that contrast by themselves: MiCE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import collectives
from armillary.components.heads import Projector
from armillary.components.held import Held
from armillary.components.queue import Queue
from armillary.components.schedules import Schedule
from armillary.components.teacher import Teacher
from armillary.losses.cluster_contrast import expert_log_likelihoods, mixture_loss
from armillary.losses.tensors import normalize, widen
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output, Samples
from armillary.objectives.bases import Export, Exports
from armillary.objectives.queue_contrastive import SHUFFLED_WAIVER, NormHyperparameters, shuffled_keys
from armillary.objectives.registry import register


class ExpertCentres(nn.Module):
    """A centre for each expert that learns by gradient and can be put elsewhere between epochs.

    A centre is ``start + drift``. What is reset is a buffer and lies outside the optimizer; what learns is a module's
    own parameter, read in its ``forward``, so that an engine that has sharded it gathers it there and for the gradient.

    Args:
        count: experts.
        dim: width of their keys.
    """

    start: Tensor
    wins: Tensor

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.drift = nn.Parameter(torch.zeros(count, dim))
        self.register_buffer("start", normalize(torch.randn(count, dim)))
        self.register_buffer("wins", torch.zeros(count, dim))

    def forward(self, like: Tensor) -> Tensor:
        """The centres ``(count, dim)`` in the type of ``like``, float32 at least."""
        centres: Tensor = self.start.to(like.dtype) + widen(self.drift)
        return centres

    @torch.no_grad()
    def count(self, winner: Tensor, keys: Tensor) -> None:
        """Adds the keys ``(batch, dim)`` of all workers to the experts ``(batch,)`` that won them."""
        local = torch.zeros_like(self.wins).index_add_(0, winner, keys.to(self.wins.dtype))
        self.wins += collectives.all_reduce_sum(local)

    @torch.no_grad()
    def reset(self) -> None:
        """Puts every centre to the mean direction of what its expert won since the last call; none won, none moved."""
        won = self.wins.abs().sum(dim=1, keepdim=True) > 0
        self.start.copy_(torch.where(won, normalize(self.wins) - self.drift.to(self.wins.dtype), self.start))
        self.wins.zero_()


def separated_directions(count: int, dim: int) -> Tensor:
    """Unit vectors ``(count, dim)`` as far apart as can be: a simplex where it fits, random ones beyond."""
    if count > dim + 1:
        return normalize(torch.randn(count, dim))
    # The corners of a simplex, less their mean, span count - 1 dimensions.
    corners = torch.eye(count) - 1 / count
    basis = torch.linalg.svd(corners).Vh[: count - 1]
    flat = normalize(corners @ basis.T)
    return torch.cat([flat, torch.zeros(count, dim - (count - 1))], dim=1)


@register
class MiCE(Exports):
    """MiCE: a mixture of contrastive experts, one a cluster, chosen by a gate.

    ``L = -mean log sum_k pi_k p(y | x, k)``, the bound of the paper at its exact posterior; gates
    ``pi = softmax(omega.g / kappa)`` towards fixed directions omega as far apart as can be, likelihoods
    :func:`armillary.losses.cluster_contrast.expert_log_likelihoods`. The experts' centres mu learn by gradient and are
    put, before every epoch, to the mean direction of the keys their experts won; one that won none stays. Views: the
    student's, the teacher's, the gate's. kappa and tau are one temperature. Keys are shuffled as MoCo's are.
    """

    name = "mice"
    family = "clustering"
    catalog_id = "mice"
    citation = Citation(
        "Tsung Wei Tsai, Chongxuan Li, Jun Zhu",
        "MiCE: Mixture of Contrastive Experts for Unsupervised Image Clustering",
        2021,
        "ICLR",
        "https://arxiv.org/abs/2105.01899",
    )
    needs = Needs(views=3, recipe="moco_v1", components=("projector", "teacher", "queue", "prototypes"))
    convergence = Convergence(
        margin=0.06,
        job={
            "objective.experts": 8,
            "objective.queue_size": 256,
            "objective.momentum": 0.99,
            "objective.projection_dim": 16,
            "objective.projection_hidden": 128,
            "objective.temperature": 0.3,
        },
    )

    waivers: ClassVar[Mapping[str, str]] = SHUFFLED_WAIVER

    directions: Tensor

    class Hyperparameters(NormHyperparameters):
        """Experts, queue, momentum, heads, batch norm."""

        experts: int = Field(10, ge=2, le=1000, description="K, experts: one a cluster")
        temperature: float = Field(1.0, ge=0.01, le=10, description="tau and kappa")
        queue_size: int = Field(16384, ge=1, le=1_048_576, description="past keys of every expert; 2048 if small")
        queue_host: bool = Field(False, description="keep the queue in main memory; costs a copy a step")
        momentum: float = Field(0.999, ge=0, le=1, description="share of the old teacher a step keeps; 0.99 if short")
        projection_dim: int = Field(128, ge=2, le=4096, description="d, width of an expert's embedding")
        projection_hidden: int = Field(512, ge=2, le=65536, description="width of the hidden layer")
        export: Export = Field("student", description="whose encoder is evaluated and kept")

    def build(self, context: BuildContext) -> None:
        """Makes experts, gate, teacher, queue and centres."""
        options = self.hyperparameters
        count, dim = options.experts, options.projection_dim
        self.experts = Projector(context.embedding_dim, options.projection_hidden, count * dim, 2, norm=False)
        self.gate = Projector(context.embedding_dim, options.projection_hidden, dim, 2, norm=False)
        self.make_keys = shuffled_keys(options, context)
        self.make_keys.convert(self.encoder, self.experts)
        momentum = Schedule(options.momentum, options.momentum, 0, "constant")
        self.teacher = Teacher(self, ("encoder", "experts"), momentum)
        self.queue = Queue(options.queue_size, (count, dim), host=options.queue_host)
        self.centres = ExpertCentres(count, dim)
        self.register_buffer("directions", separated_directions(count, dim))
        self._won = Held()

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Puts every centre where the keys lie that its expert won."""
        self.centres.reset()

    def forward(self, batch: Batch) -> Output:
        """Minus the mean log likelihood."""
        options = self.hyperparameters
        shape = (len(batch.index), options.experts, options.projection_dim)
        student, _, gating = batch.views
        (made,) = self.make_keys(self.teacher, batch.views[1:2], batch.index, self.step)
        embeddings = self.encoder(torch.cat([student, gating]))
        own, other = embeddings.chunk(2)
        keys = normalize(widen(made).view(shape))
        gate = normalize(widen(self.gate(other)))
        logits = gate @ self.directions.to(gate.dtype).T / options.temperature
        likelihoods = expert_log_likelihoods(
            self.experts(own).view(shape), keys, self.centres(gate), self.queue.rows, options.temperature
        )
        gates = logits.log_softmax(dim=1)
        winner = (gates + likelihoods).detach().argmax(dim=1)
        self.queue.hold(self.step, keys)
        won = keys.gather(1, winner[:, None, None].expand(-1, 1, shape[2])).squeeze(1)
        self._won.add(self.step, winner=winner, keys=won)
        posterior = (gates + likelihoods).detach().softmax(dim=1)
        return Output(mixture_loss(gates, likelihoods), {"posterior_confidence": posterior.amax(dim=1).mean()})

    def after_step(self, step: int) -> None:
        """Moves the teacher, fills the queue, remembers who won what."""
        self.teacher.update(self, step)
        self.queue.write()
        won = self._won.take()
        if won:
            self.centres.count(won["winner"], won["keys"])
