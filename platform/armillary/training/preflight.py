"""Everything that can be wrong with a train job is found here, before a worker starts or a file is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from armillary.components.backbones import Pixels, build_encoder, check_modality
from armillary.components.encoders import LayeredEncoder, check_ability, check_sizes
from armillary.components.recommendation import LightGCN
from armillary.data.inputs import as_inputs
from armillary.data.loader import Batches
from armillary.data.pixels import mean_image
from armillary.data.splits import PreparedData, prepare
from armillary.data.views import Views, make_views
from armillary.data.views.geometry import output_size
from armillary.evaluation.suite import check_protocols
from armillary.objectives import BuildContext, Needs, Objective, registry
from armillary.objectives.terms import choose_terms, needs_with_terms, with_terms
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.spec.loading import located
from armillary.training.initial import check_initial, load_initial


@dataclass(frozen=True)
class Plan:
    """A job that can run: its parts, found and checked."""

    job: TrainJob
    data: PreparedData
    views: Views
    needs: Needs

    def build(self) -> Objective:
        """The objective with its encoder, from fresh random weights (the caller seeds torch) or another run's.

        They are there before the objective is made, so that its teachers start as copies of them.
        """
        train, encoder = self.data.train, self._encoder()
        if isinstance(encoder, Pixels):
            encoder.fit(mean_image(train.images)[None])
        if isinstance(encoder, LightGCN):
            encoder.connect(self.data.inputs["edges"])
        if self.job.train.init_from:
            load_initial(encoder, self.job)
        return self._objective(self._context(encoder))

    def rehearse(self) -> None:
        """Makes the objective once without memory: what it refuses is said before a run starts.

        Raises:
            UserError: a hyperparameter does not fit the encoder or the data.
        """
        with torch.device("meta"):
            encoder = self._encoder()
        context = self._context(encoder)
        try:
            with torch.device("meta"):
                self._objective(context)
        except UserError:
            raise
        except Exception:  # noqa: BLE001 - it is made again in earnest
            # What needs values to be made (another run's weights, say) cannot be rehearsed, and an objective from
            # outside may want others still: the worker makes it in earnest and says what is wrong.
            return

    def _encoder(self) -> nn.Module:
        _, channels, height, width = self.data.train.images.shape
        return build_encoder(self.job.backbone, in_channels=channels, image_size=(height, width))

    def _context(self, encoder: nn.Module) -> BuildContext:
        train, (_, channels, height, width) = self.data.train, self.data.train.images.shape
        return BuildContext(
            encoder=encoder,
            embedding_dim=self.job.backbone.output_dim,
            num_classes=self.data.num_classes,
            num_samples=len(train),
            epochs=self.job.train.epochs,
            steps_per_epoch=self.batches().steps_per_epoch if self.job.train.epochs else 1,
            batch_size=self.job.train.batch_size,
            seed=self.job.seed,
            dataset_size=int(train.index.max()) + 1,
            in_channels=channels,
            image_size=(height, width),
            class_counts=torch.bincount(train.label, minlength=self.data.num_classes),
            tables=self.data.inputs,
        )

    def _objective(self, context: BuildContext) -> Objective:
        chosen = self.job.objective
        objective = registry.get(chosen.name)(registry.hyperparameters(chosen.name, chosen.options), context)
        return with_terms(objective, choose_terms(chosen.terms), context)

    def batches(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu") -> Batches:
        """The training batches of one worker."""
        train = self.job.train
        return Batches(
            self.data.train, self.needs, self.views, train.batch_size, self.job.seed, rank, world_size, device
        )


def plan(
    job: TrainJob,
    *,
    prepared: Callable[..., PreparedData] = prepare,
    capacity: Mapping[str, float] | None = None,
    tokenizer: str = "",
) -> Plan:
    """Checks a job as a whole and finds its parts.

    Args:
        job: what the user wrote.
        prepared: how data is loaded; a crew passes one that remembers.
        capacity: resources of the cluster (``CPU``, ``GPU``); the local machine's when ``None``.
        tokenizer: that of a run that goes on; by default one is trained.

    Raises:
        UserError: the first thing that is wrong, with its key and what would be right.
    """
    with located(job):
        needs, job = needs_of(job), with_backbone(job)
        recipe = needs.recipe if job.views.name == "auto" else job.views.name
        fixed = needs.recipe_options if recipe == needs.recipe else {}
        views = make_views(recipe, {**fixed, **job.views.options})
        if recipe != needs.recipe and views.count not in (None, needs.views):
            raise UserError(
                f"the recipe {recipe} makes {views.count} views, {job.objective.name} compares {needs.views}",
                key="views.name",
                allowed=f"auto ({needs.recipe}), or a recipe that makes as many views as it is asked for",
            )
        _check_backbone(job, needs)
        check_protocols(job.evaluate.protocols, job.data.split)
        check_modality_of_protocols(job.evaluate.protocols, needs, job.objective.name)
        _check_training(job, needs)
        check_capacity(job, capacity or local_capacity())
        data = as_inputs(prepared(job.data, seed=job.seed), needs, job.data, tokenizer)
        ready = Plan(job, data, views, needs)
        if job.train.init_from:
            check_initial(job, data.train.images.shape[1], (data.train.images.shape[2], data.train.images.shape[3]))
        if job.train.epochs:
            _check_encoder(job, needs, views, (data.train.images.shape[2], data.train.images.shape[3]))
            # Says what the data lacks, or why such batches cannot be made of it.
            ready.batches(0, job.train.workers)
            ready.rehearse()
        return ready


def needs_of(job: TrainJob) -> Needs:
    """What a job's objective needs under its hyperparameters.

    Raises:
        UserError: an unknown objective, term or hyperparameter.
    """
    objective = registry.get(job.objective.name, key="objective.name")
    needs = objective.needs_for(registry.hyperparameters(job.objective.name, job.objective.options))
    return needs_with_terms(needs, choose_terms(job.objective.terms), job.objective.name)


# What ``backbone.name: auto`` stands for, where images are not what an objective is given.
_AUTO = {"text": "text_transformer", "graph": "gin", "interactions": "lightgcn"}


def with_backbone(job: TrainJob) -> TrainJob:
    """The job with the small network that fits its objective, where its backbone is ``auto``; otherwise the job itself.

    ``small_vit`` where patch tokens are needed, ``small_convnet`` for other images.
    """
    if job.backbone.name != "auto":
        return job
    needs = needs_of(job)
    images = "small_vit" if needs.encoder == "tokens" else "small_convnet"
    chosen = job.backbone.model_copy(update={"name": _AUTO.get(needs.modality, images)})
    return job.model_copy(update={"backbone": chosen})


# Protocols that judge one modality only.
_JUDGES = {"cross_retrieval": "image_text", "recommendation": "interactions"}


def check_modality_of_protocols(
    names: Iterable[str], needs: Needs, objective: str, key: str | None = "evaluate.protocols", where: str | None = None
) -> None:
    """Checks that protocols judge what an objective embeds.

    Raises:
        UserError: one does not.
    """
    for name in names:
        if _JUDGES.get(name, needs.modality) != needs.modality:
            raise UserError(
                f"{name} judges objectives on {_JUDGES[name]}, and {objective} is one on {needs.modality}",
                key=key,
                where=where,
                hint="`armillary objectives show NAME` says an objective's modality",
            )
        if needs.modality == "interactions" and name not in _JUDGES:
            raise UserError(
                f"{objective} embeds users and items, and {name} compares samples by their classes",
                key=key,
                where=where,
                allowed="recommendation",
            )


def _check_backbone(job: TrainJob, needs: Needs) -> None:
    check_modality(job.backbone.name, needs.modality, job.objective.name)
    try:
        with torch.device("meta"):
            encoder = build_encoder(job.backbone, in_channels=1, image_size=job.data.image_size or (64, 64))
        if job.optimizer.layer_decay < 1 and not any(isinstance(part, LayeredEncoder) for part in encoder.modules()):
            raise UserError(f"{job.backbone.name} has no layers", key="optimizer.layer_decay", allowed="1")
    except UserError as error:
        # How large the images are is known when the data is there.
        if job.data.image_size or error.key not in ("backbone.patch", "data.image_size"):
            raise
    if job.backbone.name == "pixels" and job.train.epochs:
        raise UserError("the backbone 'pixels' has nothing to train", key="train.epochs", allowed="0")


def _check_encoder(job: TrainJob, needs: Needs, views: Views, size: tuple[int, int]) -> None:
    """Checks that the encoder gives what the objective uses, for images and views of their sizes."""
    if needs.modality not in ("image", "image_text"):
        return
    with torch.device("meta"):
        encoder = build_encoder(job.backbone, in_channels=1, image_size=size)
    check_ability(encoder, needs.encoder, job.objective.name, job.backbone.name)
    recipes = [views.recipe(view) for view in range(views.count or needs.views)]
    # Puzzles are cut up again by the objective that asks for them.
    seen = [output_size(recipe, *size) for recipe in recipes if not recipe.tiles]
    check_sizes(encoder, [size, *seen], job.backbone.name)


def _check_training(job: TrainJob, needs: Needs) -> None:
    train = job.train
    parts = train.workers * train.accumulate
    if train.batch_size % parts:
        raise UserError(
            f"batch_size {train.batch_size} cannot be shared evenly by {train.workers} workers x {train.accumulate} "
            "micro-batches",
            key="train.batch_size",
            allowed=f"a multiple of {parts}",
        )
    if needs.batch_coupled and train.accumulate > 1:
        raise UserError(
            f"{job.objective.name} compares the samples of a batch with each other, so that accumulating micro-batches "
            "would train another loss",
            key="train.accumulate",
            allowed="1",
            hint="raise train.workers to make micro-batches smaller; workers share one global batch",
        )
    if train.sample_rate < 1 and "class_head" not in needs.components:
        raise UserError(f"{job.objective.name} has no class head to sample from", key="train.sample_rate", allowed="1")
    if train.precision == "bf16" and any(key in train.deepspeed for key in ("bf16", "fp16")):
        raise UserError("sets the precision a second time", key="train.deepspeed", hint="use train.precision alone")


def local_capacity() -> dict[str, float]:
    """CPUs and GPUs of this machine."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def check_capacity(job: TrainJob, capacity: Mapping[str, float]) -> None:
    """Checks that the cluster is large enough.

    Raises:
        UserError: it is not; shows the sum.
    """
    train = job.train
    for resource, each in (("CPU", 1.0), ("GPU", train.gpus_per_worker)):
        there = capacity.get(resource, 0.0)
        if train.workers * each > there:
            most = int(there // each)
            raise UserError(
                f"{train.workers} workers x {each:g} {resource} = {train.workers * each:g} {resource}, "
                f"but the cluster has {there:g}",
                key="train.workers" if most or resource == "CPU" else "train.gpus_per_worker",
                allowed=f"1 to {most} workers" if most else f"0 (there is no {resource})",
            )
