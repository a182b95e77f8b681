"""``train.init_from``: training that starts from the encoder of a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from armillary.components.backbones import build_encoder
from armillary.components.tail import Tail, TailedEncoder
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec, DataSpec, TrainJob
from armillary.spec.loading import load_job
from armillary.training.model import describe, load_encoder, load_projector, shape
from armillary.training.rundir import RunDirectory

_KEY = "train.init_from"


def check_initial(job: TrainJob, channels: int, size: tuple[int, int]) -> None:
    """Checks that a job can start from the run it names, and that this run has not seen what the job is judged by.

    Args:
        job: with ``train.init_from``.
        channels: of the job's images.
        size: their height and width in pixels.

    Raises:
        UserError: no such run, it has no model, it is another network, or it (or a run it started from itself) was
            trained on images that the job evaluates.
    """
    run = _find(job)
    for ancestor, trained in _ancestors(run):
        _check_unseen(job.data, trained.data, ancestor)
    found = describe(run)
    theirs = BackboneSpec(**found["backbone"])
    with torch.device("meta"):
        body = build_encoder(_without_tail(job.backbone), in_channels=channels, image_size=size).state_dict()
        stored = build_encoder(
            _without_tail(theirs), in_channels=found["in_channels"], image_size=tuple(found["image_size"])
        ).state_dict()
    if theirs.name != job.backbone.name or any(shape(body, name) != shape(stored, name) for name in {*body, *stored}):
        raise UserError(
            f"run {run.run_id} has another network: {_shown(theirs, found['in_channels'], found['image_size'])}; "
            f"the job's is {_shown(job.backbone, channels, size)}",
            key=_KEY,
            allowed="a run with the job's backbone",
        )
    if theirs.tail not in ((), job.backbone.tail):
        raise UserError(
            f"found {list(job.backbone.tail)}", key="backbone.tail", allowed=f"{list(theirs.tail)}, the run's"
        )
    if not theirs.tail:
        _check_tail(job, run)


def load_initial(encoder: nn.Module, job: TrainJob) -> None:
    """Fills a new encoder, made as the job says, with the run's weights; a new tail with its projector's first layers.

    Call it before the objective is made: teachers then start as copies.
    """
    run = _find(job)
    stored = load_encoder(run)
    if isinstance(encoder, TailedEncoder) and not isinstance(stored, TailedEncoder):
        encoder.encoder.load_state_dict(stored.state_dict())
        encoder.tail.load_state_dict(_tail_state(encoder.tail, load_projector(run)))
    else:
        encoder.load_state_dict(stored.state_dict())


def _find(job: TrainJob) -> RunDirectory:
    assert job.train.init_from is not None
    try:
        return RunDirectory.find(job.train.init_from)
    except UserError as error:
        raise UserError(error.problem, key=_KEY, allowed=error.allowed, hint=error.hint) from None


def _without_tail(spec: BackboneSpec) -> BackboneSpec:
    return spec.model_copy(update={"tail": ()})


def _shown(spec: BackboneSpec, channels: int, size: Sequence[int]) -> str:
    options = {"embedding_dim": spec.embedding_dim, **spec.options}
    listed = ", ".join(f"{key} {value}" for key, value in options.items())
    if spec.name == "lightgcn":
        return f"{spec.name} ({listed}) for {channels} nodes, {size[0]} users, {size[1]} edges"
    return f"{spec.name} ({listed}) for {channels} x {size[0]} x {size[1]}"


def _tail_state(tail: Tail, projector: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: projector[name] for name in tail.state_dict()}


def _check_tail(job: TrainJob, run: RunDirectory) -> None:
    with torch.device("meta"):
        wanted = Tail(job.backbone.embedding_dim, job.backbone.tail).state_dict()
    projector = load_projector(run)
    if any(shape(projector, name) != tuple(value.shape) for name, value in wanted.items()):
        layers = [shape(projector, f"linear{number}.weight") for number in range(1, 9)]
        hidden = [str(layer[0]) for layer in layers if layer][:-1]
        raise UserError(
            f"run {run.run_id} has no projector whose first layers, with batch norm, have the widths "
            f"{list(job.backbone.tail)}",
            key="backbone.tail",
            allowed=f"the first of [{', '.join(hidden)}]" if hidden else "[]: the run left no projector with layers",
        )


def _ancestors(run: RunDirectory) -> Iterator[tuple[RunDirectory, TrainJob]]:
    """A run, the run it started from, and so on."""
    while True:
        job = load_job(run.path / "job.yaml", kind="train")
        assert isinstance(job, TrainJob)
        yield run, job
        if job.train.init_from is None:
            return
        run = _find(job)


def _check_unseen(judged: DataSpec, trained: DataSpec, run: RunDirectory) -> None:
    """Whether what one job evaluates was left out of another's training, where both use one dataset."""
    if judged.name != trained.name:
        return
    same_fold = (judged.split, judged.fold) == (trained.split, trained.fold)
    # What validation trains on is a part of what the test trains on.
    if not same_fold or (judged.holdout, trained.holdout) == ("validation", "test"):
        raise UserError(
            f"run {run.run_id} was trained on images that this job evaluates: its data are fold {trained.fold} by "
            f"{trained.split}, holdout {trained.holdout}",
            key=_KEY,
            allowed="a run with the same data.split, data.fold and data.holdout",
        )
