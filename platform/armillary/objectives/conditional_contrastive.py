"""Contrast of images with each other and with a vector of their class."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from armillary.components.heads import Projector
from armillary.losses.conditional_contrast import ConditionalContrastive
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Output
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import register


@register
class ContraGAN2C(ClassHeadObjective):
    """ContraGAN's 2C loss: images of a class attract each other and their class's vector, against the whole batch.

    Equation and shapes: :class:`armillary.losses.conditional_contrast.ConditionalContrastive`. In the paper it
    conditions a generative adversarial network; here it stands alone as a loss that knows the labels, without generator
    and adversarial term, and so without the weight that balances them.
    """

    name = "contragan_2c"
    family = "contrastive_supervised"
    catalog_id = "contragan_2c"
    citation = Citation(
        "Minguk Kang, Jaesik Park",
        "ContraGAN: Contrastive Learning for Conditional Image Generation",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.12681",
    )
    needs = Needs(recipe="faces", fields=("label",), components=("projector", "class_vectors"), batch_coupled=True)

    convergence = Convergence(margin=0.15)

    class Hyperparameters(base.Hyperparameters):
        """Temperature of the loss, shape of the projector."""

        temperature: float = Field(1.0, ge=0.005, le=10, description="t, divides the cosines")
        projection_dim: int = Field(128, ge=2, le=8192, description="width of the projection")
        projection_hidden: int = Field(2048, ge=2, le=65536, description="width of the hidden layers")
        projection_layers: int = Field(1, ge=1, le=8, description="linear layers of the projector")

    def build(self, context: BuildContext) -> None:
        """Makes the projector and the loss with its vectors."""
        options = self.hyperparameters
        self.projector = Projector(
            context.embedding_dim,
            options.projection_hidden,
            options.projection_dim,
            options.projection_layers,
            norm=False,
        )
        self.conditional = ConditionalContrastive(context.num_classes, options.projection_dim, options.temperature)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's projections."""
        metrics: dict[str, Tensor] = {}
        projections = self.projector(self.encoder(batch.views[0]))
        return Output(self.conditional(projections, batch.label, metrics=metrics), metrics)
