"""The registry, its input checks, and the suite on an encoder."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from armillary.evaluation import protocols
from armillary.evaluation.extract import extract
from armillary.evaluation.result import Templates
from armillary.evaluation.suite import check_protocols
from armillary.spec.errors import UserError

CLOSED = ("few_label", "knn", "probe", "recommendation")
TRAINED = (*CLOSED, "quality_verification")
# Documented as a family: tar_at_far_1e-k.
RATES = ("tar_at_far_", "dir_at_far_", "tpr_at_fpr_")


def grouped(size: int) -> Templates:
    """Templates of two images, each a media of its own; every other one is in the gallery."""
    row = np.arange(size)
    return Templates(row, row // 2, row, gallery=np.where(row // 2 % 2, -1, 0))


# What compares images with captions or users with items needs both; they have tests of their own.
WITHOUT_CAPTIONS = [name for name in protocols.names() if name not in ("cross_retrieval", "recommendation")]


@pytest.mark.parametrize("name", WITHOUT_CAPTIONS)
def test_every_protocol_runs_names_its_metrics_and_documents_them(blobs: Any, name: Any) -> None:
    points, labels = blobs(classes=6, per_class=20)
    train, train_labels = blobs(classes=6, per_class=20)
    options: dict[str, Any] = {"train_embeddings": train, "train_labels": train_labels, "templates": grouped(120)}
    result = protocols.evaluate(name, points, labels, columns={"quality": np.arange(120.0)}, **options)
    assert result.metrics
    for metric, value in result.metrics.items():
        family, _, short = metric.partition("/")
        assert family == name
        assert np.isfinite(value)
        documented = protocols.get(name).run.__doc__ or ""
        if name != "clustering":
            assert short in documented or short.startswith(RATES)
    assert protocols.get(name).summary.endswith((".", "?")) or ":" in protocols.get(name).summary


@pytest.mark.parametrize("name", WITHOUT_CAPTIONS)
def test_tensors_and_float32_are_as_good_as_arrays(blobs: Any, name: Any) -> None:
    points, labels = blobs(classes=4, per_class=12)
    points = points.astype(np.float32)
    options: dict[str, Any] = {"train_embeddings": points[::2], "train_labels": labels[::2]}
    arrays = protocols.evaluate(name, points, labels, templates=grouped(48), **options)
    options = {key: torch.tensor(value) for key, value in options.items()}
    tensors = protocols.evaluate(name, torch.tensor(points), torch.tensor(labels), templates=grouped(48), **options)
    assert tensors.metrics == arrays.metrics


def test_unknown_names_show_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        protocols.get("verificaton", where="job.yaml:3", key="evaluate.protocols")
    assert "'verification'" in str(caught.value.hint)
    assert "job.yaml:3" in str(caught.value)


def test_requirements_say_which_split_fits() -> None:
    for name in protocols.names():
        wants = protocols.requirements(name)
        assert wants.needs_train == (name in TRAINED)
        splits: tuple[tuple[Literal["sample", "identity"], bool], ...] = (("sample", True), ("identity", False))
        for split, closed in splits:
            if wants.closed_set in (None, closed):
                check_protocols([name], split)
            else:
                with pytest.raises(UserError, match=f"{name} cannot judge"):
                    check_protocols([name], split)
    with pytest.raises(UserError, match="no protocol"):
        check_protocols([], "sample")


@pytest.mark.parametrize(
    ("embeddings", "labels", "words"),
    [
        (np.ones(4), [0, 0, 1, 1], "shape"),
        (np.ones((4, 0)), [0, 0, 1, 1], "shape"),
        (np.ones((4, 2)), [0, 0, 1], "one a sample"),
        (np.ones((4, 2)), [0.5, 0, 1, 1], "integers or strings"),
        (np.ones((4, 2), dtype=complex), [0, 0, 1, 1], "real numbers"),
        (np.array([[1, 2], [np.nan, 1], [0, 1], [np.inf, 1]]), [0, 0, 1, 1], "2 of 4 .* row 1"),
        (np.ones((1, 2)), [0], "two embeddings"),
    ],
)
def test_malformed_input_is_refused(embeddings: Any, labels: Any, words: Any) -> None:
    with pytest.raises(UserError, match=words):
        protocols.evaluate("geometry", embeddings, labels)


class Probe(nn.Module):
    """Shows what it was given and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        self.sizes: list[int] = []

    def forward(self, images: Any) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.sizes.append(len(images))
        return self.norm(images)[:, 0, 0, :].double()


def test_extract_batches_scales_and_restores_every_mode() -> None:
    encoder = Probe().train()
    encoder.frozen.eval()
    images = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 1, 1, 4)
    before = encoder.norm.state_dict()["running_mean"].clone()
    embeddings = extract(encoder, images, batch_size=2)
    assert encoder.sizes == [2, 2, 1]
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, images[:, 0, 0].float() / 255, rtol=1e-4, atol=1e-6)
    assert (encoder.training, encoder.norm.training, encoder.frozen.training) == (True, True, False)
    assert torch.equal(encoder.norm.state_dict()["running_mean"], before)


def test_extract_averages_the_mirrored_image() -> None:
    images = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).reshape(1, 1, 1, 4)
    plain, mean = extract(Probe(), images), extract(Probe(), images, flip=True)
    torch.testing.assert_close(mean, (plain + plain.flip(1)) / 2)


def test_extract_restores_modes_after_a_failure_and_refuses_floats() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).train()
    with pytest.raises(RuntimeError):
        extract(encoder, torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert encoder.training
    with pytest.raises(ValueError, match="uint8"):
        extract(encoder, torch.zeros(1, 1, 1, 3))


def test_extract_in_bf16_is_close_and_float32() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    images = torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8)
    exact, rough = extract(encoder, images), extract(encoder, images, precision="bf16")
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)
