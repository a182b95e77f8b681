"""The catalog's reference values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary import losses
from armillary.losses.class_head import ClassHeadLoss
from armillary.losses.tensors import normalize
from armillary.testing.references import ReferenceCase, assert_value, reference_cases

VALUES = Path(__file__).with_name("catalog_values.yaml")


def cases(loss: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", reference_cases(VALUES, loss), ids=str)


def from_cosines(kind: type[ClassHeadLoss], classes: int, **options: Any) -> ClassHeadLoss:
    """The loss on given cosines: its rows are unit vectors, its similarity plain products, so that it is the input."""
    loss = kind(classes, classes, **options).double()
    with torch.no_grad():
        loss.weight.copy_(torch.eye(classes))
    loss.similarity = lambda cosines, rows: cosines @ rows["weight"].T  # type: ignore[method-assign,assignment,misc]
    return loss


@cases("softmax")
def test_softmax(case: ReferenceCase) -> None:
    loss = losses.Softmax(3, 2, reduction="none").double()
    with torch.no_grad():
        loss.weight.copy_(case.tensor("weight"))
        assert loss.bias is not None
        loss.bias.copy_(case.tensor("bias"))
    values = loss(case.tensor("embeddings"), case.tensor("labels"))
    assert_value(values, case.result["per_sample"])
    assert_value(values.mean(), case.result["mean"])


@cases("normface_features")
def test_normface_from_features(case: ReferenceCase) -> None:
    embeddings, labels = case.tensor("embeddings"), case.tensor("labels")
    loss = losses.NormFace(3, 2, **case.params).double()
    with torch.no_grad():
        loss.weight.copy_(case.tensor("weight"))
    assert_value(loss.similarity(embeddings), case.result["cosines"])
    value = loss(embeddings, labels)
    value.backward()
    assert_value(value, case.result["mean"])
    assert embeddings.grad is not None
    assert_value(embeddings.grad, case.result["gradient"])


def _check_cosines(loss: ClassHeadLoss, case: ReferenceCase) -> None:
    cosines, labels = case.tensor("cosines"), case.tensor("labels")
    value = loss(cosines, labels)
    value.backward()
    assert_value(value, case.result["mean"])
    if "gradient" in case.result:
        assert cosines.grad is not None
        assert_value(cosines.grad, case.result["gradient"])
    if "target" in case.result:
        own = cosines.gather(1, labels[:, None])
        assert_value(loss.target(own, own.new_tensor(loss.margin)).squeeze(1), case.result["target"])
    if "per_sample" in case.result:
        loss.reduction = "none"
        assert_value(loss(cosines, labels), case.result["per_sample"])


@cases("normface")
def test_normface(case: ReferenceCase) -> None:
    _check_cosines(from_cosines(losses.NormFace, 3, **case.params), case)


@cases("cosface")
def test_cosface(case: ReferenceCase) -> None:
    _check_cosines(from_cosines(losses.CosFace, 3, **case.params), case)


@cases("arcface")
def test_arcface(case: ReferenceCase) -> None:
    _check_cosines(from_cosines(losses.ArcFace, 3, **case.params), case)


@pytest.mark.parametrize(
    ("classes", "scale", "bound"), [(3, 10.0, 6.1180445e-07), (10, 16.0, 1.7117947e-07), (10, 1.0, 1.37693492)]
)
def test_normface_simplex_bound(classes: int, scale: float, bound: float) -> None:
    """Class rows on a regular simplex, each sample on its class: the lowest loss there is."""
    simplex = normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes)
    loss = losses.NormFace(classes, classes, scale=scale).double()
    with torch.no_grad():
        loss.weight.copy_(simplex)
    torch.testing.assert_close(
        loss(simplex, torch.arange(classes)).detach(), torch.tensor(bound, dtype=torch.float64), rtol=1e-7, atol=1e-14
    )


def _check_contrast(value: Tensor, values: Tensor, first: Tensor, case: ReferenceCase) -> None:
    value.backward()
    assert_value(value, case.result["mean"])
    if "per_sample" in case.result:
        assert_value(values, case.result["per_sample"])
    if "gradient_row0" in case.result:
        assert first.grad is not None
        assert_value(first.grad[0], case.result["gradient_row0"])


@cases("supcon")
def test_supcon(case: ReferenceCase) -> None:
    embeddings, labels = case.tensor("embeddings"), case.tensor("labels")
    values = losses.SupCon(**case.params, reduction="none")(embeddings, labels)
    _check_contrast(losses.SupCon(**case.params)(embeddings, labels), values, embeddings, case)


@cases("nt_xent")
def test_nt_xent(case: ReferenceCase) -> None:
    view1, view2 = case.tensor("view1"), case.tensor("view2")
    values = losses.NTXent(**case.params, reduction="none")(view1, view2)
    _check_contrast(losses.NTXent(**case.params)(view1, view2), values, view1, case)


@cases("triplet")
def test_triplet(case: ReferenceCase) -> None:
    metrics: dict[str, Tensor] = {}
    value = losses.Triplet(**case.params)(case.tensor("embeddings"), case.tensor("labels"), metrics=metrics)
    assert_value(value, case.result["value"])
    assert float(metrics["triplets"]) == case.result["triplets"]
    if "active" in case.result:
        assert float(metrics["active_share"]) == pytest.approx(case.result["active"] / case.result["triplets"])
