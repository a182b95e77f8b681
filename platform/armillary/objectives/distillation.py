"""Distillation: a student takes over the class probabilities of a teacher that is not trained any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import nn

from armillary.components.frozen import ClassMeans, check_teacher, load_teacher
from armillary.losses import self_distillation as losses
from armillary.objectives import base
from armillary.objectives.base import Batch, BuildContext, Citation, Convergence, Needs, Objective, Output, Samples
from armillary.objectives.registry import register

_KEY = "objective.teacher"


@register
class Distillation(Objective):
    """Distillation: the student's classifier repeats a frozen teacher's probabilities; images need no labels.

    SimCLR v2's third step (Chen et al. 2020, equations 2 and 3; Hinton et al. 2015): student and teacher see the same
    crop. ``teacher`` names a finished run of the objective softmax, whose encoder may be another and larger one.
    Without a run the teacher is the encoder as training starts (``train.init_from`` fills it), which tells classes by
    the nearest class mean over the training set; this is ours, for representations that were learned without labels,
    and needs labels as alpha below 1 does. The student's encoder starts like that of any objective.
    """

    name = "distillation"
    family = "self_distillation"
    catalog_id = "distillation"
    citation = Citation(
        "Ting Chen, Simon Kornblith, Kevin Swersky, Mohammad Norouzi, Geoffrey Hinton",
        "Big Self-Supervised Models are Strong Semi-Supervised Learners",
        2020,
        "NeurIPS",
        "https://arxiv.org/abs/2006.10029",
    )
    needs = Needs(
        recipe="simclr",
        recipe_options={"jitter_p": 0.0, "gray_p": 0.0},
        fields=("label",),
        components=("classifier", "teacher"),
    )
    waivers: ClassVar[Mapping[str, str]] = {"gradcheck": "the teacher sees the same images and passes no gradient"}
    convergence = Convergence(job={"views.name": "faces"})

    class Hyperparameters(base.Hyperparameters):
        """Teacher, and arguments of :class:`armillary.losses.self_distillation.Distillation`."""

        teacher: str = Field("", description="a finished run of softmax; empty: class means of the starting encoder")
        temperature: float = Field(1.0, ge=0.01, le=100, description="tau; 0.1 for a teacher as large as the student")
        alpha: float = Field(1.0, ge=0, le=1, description="weight of the teacher; the rest is the labels'")
        tau_squared: bool = Field(False, description="multiply the teacher's term by tau^2 (Hinton et al.)")
        scale: float = Field(16.0, gt=0, le=1000, description="of the class means' cosines, with no run as teacher")

    @classmethod
    def needs_for(cls, hyperparameters: Hyperparameters) -> Needs:
        """No labels where the teacher is a run and nothing else is learned; checks that there is such a run."""
        if hyperparameters.teacher:
            check_teacher(hyperparameters.teacher, _KEY)
        labelled = not hyperparameters.teacher or hyperparameters.alpha < 1
        return replace(cls.needs, fields=("label",) if labelled else ())

    def build(self, context: BuildContext) -> None:
        """Makes the student's classifier and loads or copies the teacher."""
        options = self.hyperparameters
        self.classifier = nn.Linear(context.embedding_dim, context.num_classes)
        self.teacher = (
            load_teacher(options.teacher, context.num_classes, _KEY)
            if options.teacher
            else ClassMeans(self.encoder, context.embedding_dim, context.num_classes, options.scale)
        )
        self.loss = losses.Distillation(options.temperature, options.alpha, options.tau_squared)

    def before_epoch(self, epoch: int, samples: Samples) -> None:
        """Before the first epoch the class means are taken."""
        if epoch == 0 and isinstance(self.teacher, ClassMeans):
            self.teacher.fit((batch.views[0], batch.label) for batch in samples())

    def forward(self, batch: Batch) -> Output:
        """Both classifiers on the same images."""
        student, teacher = self.classifier(self.encoder(batch.views[0])), self.teacher(batch.views[0])
        loss = self.loss(student, teacher, batch.label if self.hyperparameters.alpha < 1 else None)
        agreement = (student.argmax(dim=1) == teacher.argmax(dim=1)).to(loss.dtype).mean()
        return Output(loss, {"agreement": agreement.detach()})
