"""Contrast over the frames of videos."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import losses
from armillary.components.counter import key, permutations, sample_keys
from armillary.components.heads import Projector
from armillary.losses.future_contrast import FutureContrast
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output
from armillary.objectives.registry import register

_SHUFFLE = 73


@register
class TemporalContrastive(Objective):
    """Temporal contrast: what a video shows next is told from all else; or two clips of it recognise each other.

    ``formulation: paper`` is temporal contrastive pretraining. Segments of ``clip_length`` frames follow each other;
    z_t is the projected mean of a segment's frame embeddings, ``c_t = GRU(z_1 .. z_t)``, and linear maps W_k predict::

        L = sum_{k=1..horizon} mean_{i,t} -log exp(z_{i,t+k} . W_k c_{i,t}) / sum_{j,s} exp(z_{j,s} . W_k c_{i,t})

    (:class:`armillary.losses.future_contrast.FutureContrast`). There are ``horizon + 1`` segments. Reconstructed from
    the equation of CPC that it builds on; the paper's segment encoder convolves over time, here frames are averaged.

    ``formulation: clips``: two clips in succession, means of projected frames, SimCLR's loss. ``formulation: survey``:
    a clip and the same clip with its frames in a random order, read by the recurrent network, are positives; that makes
    it blind to order, the opposite of what methods of frame order learn.

    The recipe ``frames`` gives all frames of a sample one crop and one colour.
    """

    name = "temporal_contrastive"
    family = "pretext"
    catalog_id = "temporal_contrastive"
    citation = Citation(
        "Guillaume Lorre, Jaonary Rabarisoa, Astrid Orcesi, Samia Ainouz, Stephane Canu",
        "Temporal Contrastive Pretraining for Video Action Recognition",
        2020,
        "WACV",
    )
    needs = Needs(views=32, recipe="frames", components=("projector", "recurrent"), batch_coupled=True)
    convergence = Convergence(
        dataset="identities_video",
        margin=0.03,
        job={"objective.clip_length": 2, "objective.horizon": 2, "objective.projection_dim": 64},
    )

    class Hyperparameters(base.Hyperparameters):
        """What is contrasted, and the shape of the networks."""

        formulation: Literal["paper", "clips", "survey"] = Field(
            "paper", description="segments that follow, two clips, or a clip and its shuffled frames"
        )
        clip_length: int = Field(8, ge=2, le=64, description="frames of a segment or clip; 4 suits small data")
        horizon: int = Field(3, ge=1, le=16, description="segments ahead that are predicted; 2 suits small data")
        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines of clips and of the survey")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of z and c")

    @classmethod
    def needs_for(cls, hyperparameters: Any) -> Needs:
        """As many frames as the formulation reads."""
        clips = {"paper": hyperparameters.horizon + 1, "clips": 2, "survey": 1}[hyperparameters.formulation]
        return replace(cls.needs, views=clips * hyperparameters.clip_length)

    def build(self, context: BuildContext) -> None:
        """Makes the projector, the recurrent network, the predictors and the loss."""
        options = self.hyperparameters
        width = options.projection_dim
        self.seed = context.seed
        # A linear map: each frame's or segment's projection, whose mean is the projection of the mean.
        self.projector = Projector(context.embedding_dim, 0, width, 1, norm=False)
        self.loss: nn.Module
        if options.formulation == "paper":
            self.predictors = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(options.horizon))
            self.loss = FutureContrast()
        else:
            self.loss = losses.NTXent(options.temperature)
        if options.formulation != "clips":
            self.cell = nn.GRUCell(width, width)

    def contexts(self, inputs: Tensor) -> Tensor:
        """``c_t`` of ``(batch, time, dim)``, same shape: what the recurrent network holds after each part."""
        states = [self.cell(inputs[:, 0])]
        for time in range(1, inputs.shape[1]):
            states.append(self.cell(inputs[:, time], states[-1]))
        return torch.stack(states, dim=1)

    def forward(self, batch: Batch) -> Output:
        """The loss of the frames, which the views are."""
        metrics: dict[str, Tensor] = {}
        options = self.hyperparameters
        frames = torch.stack(self.projector(self.encoder(torch.cat(batch.views))).chunk(len(batch.views)), dim=1)
        clips = frames.unflatten(1, (-1, options.clip_length)).mean(dim=2)
        if options.formulation == "paper":
            contexts = self.contexts(clips)
            predicted = [predict(contexts[:, : -1 - step]) for step, predict in enumerate(self.predictors)]
            return Output(self.loss(clips, predicted, metrics=metrics), metrics)
        if options.formulation == "clips":
            return Output(self.loss(clips[:, 0], clips[:, 1], metrics=metrics), metrics)
        order = permutations(sample_keys(key(_SHUFFLE, self.seed, self.step), batch.index), frames.shape[1])
        shuffled = frames.gather(1, order[..., None].expand_as(frames))
        read, reread = (self.contexts(sequence)[:, -1] for sequence in (frames, shuffled))
        return Output(self.loss(read, reread, metrics=metrics), metrics)
