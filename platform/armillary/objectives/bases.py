"""Objectives of a kind: what the class-head ones share, those that project views, and those with a teacher."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from armillary.components.heads import Projector
from armillary.components.teacher import Teacher
from armillary.losses import ClassHeadLoss
from armillary.objectives.base import Batch, BuildContext, Convergence, Needs, Objective, Output

Export = Literal["student", "teacher"]


class ClassHeadObjective(Objective):
    """One view, one label: the loss owns a row per training class.

    A subclass states ``name``, ``citation``, ``loss_class`` and ``Hyperparameters``, whose fields are arguments of the
    loss. Batch fields that it needs beside the label reach the loss's rules by name.
    """

    family = "margin_softmax"
    needs = Needs(recipe="faces", fields=("label",), components=("class_head",))
    convergence = Convergence(margin=0.12)
    loss_class: ClassVar[type[ClassHeadLoss]]

    def build(self, context: BuildContext) -> None:
        """Makes the loss with its head."""
        options = self.hyperparameters.model_dump()
        self.loss = self.loss_class(context.num_classes, context.embedding_dim, **options)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view's embeddings."""
        metrics: dict[str, Tensor] = {}
        needed = self.needs_for(self.hyperparameters).fields
        info = {name: batch.fields[name] for name in needed if name != "label"}
        loss = self.loss(self.encoder(batch.views[0]), batch.label, metrics=metrics, **info)
        return Output(loss, metrics)


class ProjectedViewsObjective(Objective):
    """Several views through one encoder and one projector; the projector is dropped for evaluation.

    ``Hyperparameters`` of a subclass carry ``projection_dim``, ``projection_hidden`` and ``projection_layers``.
    """

    needs = Needs(views=2, recipe="simclr", components=("projector",), batch_coupled=True)
    projector_norm: ClassVar[bool] = True
    # Batch norm behind the last layer too; losses that standardise for themselves do without.
    projector_last_norm: ClassVar[bool] = True

    def build(self, context: BuildContext) -> None:
        """Makes the projector."""
        options = self.hyperparameters
        self.projector = Projector(
            context.embedding_dim,
            options.projection_hidden,
            options.projection_dim,
            options.projection_layers,
            norm=self.projector_norm,
            last_norm=self.projector_norm and self.projector_last_norm,
        )

    def project(self, views: tuple[Tensor, ...]) -> Tensor:
        """Projections ``(views * batch, projection_dim)``, view by view.

        All views pass in one batch, so that batch norm sees them together, as the published codes do.
        """
        projections: Tensor = self.projector(self.encoder(torch.cat(views)))
        return projections


class Exports(Objective):
    """An objective with a teacher, either of whose encoders is evaluated and kept: ``export`` says which."""

    teacher: Teacher

    def exported(self) -> nn.Module:
        """The encoder of student or teacher."""
        return self.teacher["encoder"] if self.hyperparameters.export == "teacher" else self.encoder

    def embed(self, images: Tensor) -> Tensor:
        """The exported encoder's embedding."""
        embedding: Tensor = self.exported()(images)
        return embedding
