"""Contrast of parts of a network, each trained by a loss of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary import losses
from armillary.components.encoders import map_encoder
from armillary.components.heads import Projector
from armillary.components.stage_parameters import only_learning, stage_parameters
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Objective, Output
from armillary.objectives.bases import ProjectedViewsObjective
from armillary.objectives.registry import register


@register
class LoCo(Objective):
    """LoCo: no gradient runs through the whole network; overlapping pairs of stages learn from SimCLR losses.

    With s_i the encoder's stages, h_i their maps, sg a stop of the gradient, g_i a projector of the mean over places::

        z_i = g_i(s_{i+1}(s_i(sg[h_{i-1}]))),   L_i = NT-Xent(z_i, z_i'),   L = sum_{i=1..S-1} L_i

    so that stage i learns from L_{i-1} and L_i. Without ``overlap`` it is greedy InfoMax's wiring,
    ``z_i = g_i(s_i(sg[h_{i-1}]))``, i = 1..S. The last unit's projector takes the encoder's embedding, so that what
    makes it learns too. S is the encoder's: three of ``small_convnet``, four of ResNets.

    The wiring is the paper's as remembered; its deeper decoders are ``projection_layers``. Each unit takes a forward
    pass of its own, in which only its stages record a gradient.
    """

    name = "loco"
    family = "contrastive_views"
    catalog_id = "loco"
    citation = Citation(
        "Yuwen Xiong, Mengye Ren, Raquel Urtasun",
        "LoCo: Local Contrastive Representation Learning",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2008.01342",
    )
    needs = replace(ProjectedViewsObjective.needs, encoder="maps")
    convergence = Convergence(
        margin=0.07,
        job={"objective.temperature": 0.5, "objective.projection_dim": 64, "objective.projection_hidden": 128},
    )

    class Hyperparameters(base.Hyperparameters):
        """Temperature, wiring, shape of each unit's projector."""

        temperature: float = Field(0.1, ge=0.005, le=10, description="divides the cosines; 0.5 suits small images")
        overlap: bool = Field(True, description="a unit is two stages; else one, as in greedy InfoMax")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the projections")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the projectors' hidden layers")
        projection_layers: int = Field(2, ge=1, le=8, description="linear layers of each projector")

    def build(self, context: BuildContext) -> None:
        """Finds the stages' parameters; makes a projector a unit, and the loss."""
        options = self.hyperparameters
        channels = map_encoder(self.encoder).stage_channels
        owned = stage_parameters(self.encoder, context.in_channels, context.image_size)
        stages = len(channels)
        depth = min(2 if options.overlap else 1, stages)
        # Each unit by the number of its last stage, which is also where its map stands.
        self.ends = list(range(depth - 1, stages))
        self.units = [[name for stage in owned[end - depth + 1 : end + 1] for name in stage] for end in self.ends]
        self.units[-1] = self.units[-1] + owned[-1]
        widths = [*(channels[end] for end in self.ends[:-1]), context.embedding_dim]
        shape = (options.projection_hidden, options.projection_dim, options.projection_layers)
        self.projectors = nn.ModuleList(Projector(width, *shape, last_norm=True) for width in widths)
        self.loss = losses.NTXent(options.temperature)

    def unit_loss(self, unit: int, images: Tensor) -> Tensor:
        """L of one unit, counted from 0, of both views ``(2 * batch, channels, height, width)``."""
        encoder = map_encoder(self.encoder)
        with only_learning(self.encoder, self.units[unit]):
            last = encoder.stages(images)[self.ends[unit]]
            pooled = encoder.embed_map(last) if unit == len(self.units) - 1 else last.mean(dim=(2, 3))
        view1, view2 = self.projectors[unit](pooled).chunk(2)
        loss: Tensor = self.loss(view1, view2)
        return loss

    def forward(self, batch: Batch) -> Output:
        """The sum of the units' losses."""
        images = torch.cat(batch.views)
        terms = [self.unit_loss(unit, images) for unit in range(len(self.units))]
        return Output(torch.stack(terms).sum(), {f"unit{i}": term.detach() for i, term in enumerate(terms)})
