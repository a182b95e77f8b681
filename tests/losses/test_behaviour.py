"""Bad input, empty batches, precision, memory, metrics."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary import losses
from armillary.losses.tensors import normalize

LABEL_LOSSES: list[Callable[[], nn.Module]] = [
    losses.SupCon,
    lambda: losses.SupCon(mode="in"),
    *(
        lambda mining=mining, soft=soft: losses.Triplet(mining=mining, soft=soft)
        for mining in ("all", "semi_hard", "batch_hard", "hard_negative")
        for soft in (False, True)
    ),
]
HEADS = [losses.Softmax, losses.NormFace, losses.CosFace, losses.ArcFace]


@pytest.mark.parametrize("make", LABEL_LOSSES)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0]], ids=["no_positives", "one_sample"])
def test_nothing_to_learn_from(make: Callable[[], nn.Module], labels: list[int]) -> None:
    embeddings = torch.randn(len(labels), 3, requires_grad=True)
    metrics: dict[str, Tensor] = {}
    loss = make()(embeddings, torch.tensor(labels), metrics=metrics)
    loss.backward()
    assert float(loss.detach()) == 0
    assert embeddings.grad is not None
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))
    assert float(metrics.get("anchors", metrics.get("triplets", torch.tensor(1)))) == 0


@pytest.mark.parametrize("make", LABEL_LOSSES)
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 2, 3]], ids=["pairs", "no_positives"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_inputs_show(make: Callable[[], nn.Module], labels: list[int], broken: float) -> None:
    embeddings = torch.randn(4, 3)
    embeddings[2, 1] = broken
    assert torch.isnan(make()(embeddings, torch.tensor(labels)))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_label_out_of_range(kind: type[losses.ClassHeadLoss], label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} is out of range: there are 3 classes"):
        kind(3, 4)(torch.randn(2, 4), torch.tensor([0, label]))


def test_wrong_shapes_and_options() -> None:
    head, labels = losses.ArcFace(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"labels must be \(3,\)"):
        head(torch.randn(3, 4), labels)
    with pytest.raises(ValueError, match="integers"):
        head(torch.randn(2, 4), labels.float())
    with pytest.raises(ValueError, match=r"\(batch, dim\)"):
        losses.SupCon()(torch.randn(2, 2, 4), labels)
    with pytest.raises(ValueError, match="views differ"):
        losses.NTXent()(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(ValueError, match="mining must be one of all, semi_hard"):
        losses.Triplet(mining="hardest")
    with pytest.raises(ValueError, match="temperature"):
        losses.SupCon(temperature=0.0)
    with pytest.raises(ValueError, match="scale"):
        losses.CosFace(3, 4, scale=float("nan"))
    with pytest.raises(ValueError, match="margin"):
        losses.Triplet(margin=-0.1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings(kind: type[losses.ClassHeadLoss], dtype: torch.dtype) -> None:
    """The mathematics is float32's: the result is that of the same, already rounded, numbers in float32."""
    torch.manual_seed(0)
    loss, embeddings, labels = kind(5, 8), torch.randn(6, 8).to(dtype), torch.arange(6) % 5
    exact = loss(embeddings.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(embeddings, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_half_precision_batches() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 8).bfloat16(), torch.arange(8) % 3
    for make in LABEL_LOSSES:
        with torch.autocast("cpu", torch.bfloat16):
            found = make()(embeddings, labels)
        assert torch.equal(found, make()(embeddings.float(), labels))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.NTXent()(embeddings[:4], embeddings[4:])
    assert torch.equal(found, losses.NTXent()(embeddings[:4].float(), embeddings[4:].float()))


def test_a_zero_row_has_no_gradient() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    units = normalize(vectors)
    units.sum().backward()
    torch.testing.assert_close(units.detach(), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert vectors.grad is not None
    assert torch.equal(vectors.grad[0], torch.zeros(2))
    assert vectors.grad[1].abs().max() > 0


@pytest.mark.parametrize("kind", HEADS)
def test_sample_exactly_on_its_class(kind: type[losses.ClassHeadLoss]) -> None:
    """cos = +-1, where the angle's slope is infinite."""
    loss = kind(2, 2)
    with torch.no_grad():
        loss.weight.copy_(torch.eye(2))
    embeddings = torch.tensor([[1.0, 0.0], [0.0, -1.0]], requires_grad=True)
    loss(embeddings, torch.tensor([0, 1])).backward()
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()


@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
def test_all_triplets_are_not_enumerated(soft: bool) -> None:
    """600 samples of 60 classes have 3.2 million triplets; nothing of that size is stored for the backward pass."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(600, 4, requires_grad=True), torch.arange(600) % 60
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = losses.Triplet(0.2, "all", soft=soft)(embeddings, labels)
    loss.backward()
    assert 0 < largest <= 600 * 601


def test_head_metrics() -> None:
    loss = losses.ArcFace(2, 2, margin=1.5)
    with torch.no_grad():
        loss.weight.copy_(torch.eye(2))
    metrics: dict[str, Tensor] = {}
    loss(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.6, -0.8]]), torch.tensor([0, 0, 1]), metrics=metrics)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["target_cosine"]) == pytest.approx((1 + 0.6 - 0.8) / 3)


def test_a_scale_is_logged_where_there_is_one() -> None:
    embeddings, labels = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1])
    rows = torch.tensor([[0.0, 2.0], [1.0, 0.0]])

    def logged(loss: losses.ClassHeadLoss) -> dict[str, float]:
        with torch.no_grad():
            loss.weight.copy_(rows)
        metrics: dict[str, Tensor] = {}
        loss(embeddings, labels, metrics=metrics)
        return {name: float(value) for name, value in metrics.items() if not name.startswith(("accuracy", "target"))}

    assert logged(losses.Softmax(2, 2)) == {}
    assert logged(losses.P2SGrad(2, 2)) == {}
    assert logged(losses.L2Softmax(2, 2, radius=7)) == {"radius": 7}
    assert logged(losses.ArcFace(2, 2, scale=9)) == {"scale": 9}
    assert logged(losses.LSoftmax(2, 2, scale=9, formulation="survey")) == {"scale": 9}
    eased: dict[str, Any] = {
        "annealing_start": 8.0,
        "annealing_speed": 1.0,
        "annealing_power": 1.0,
        "annealing_floor": 0.0,
    }
    assert logged(losses.LSoftmax(2, 2, **eased)) == {"scale": (5 * 2 + 2 * 1) / 2, "plain_weight": 4}
    assert logged(losses.SphereFace(2, 2, **eased)) == {"scale": (5 + 2) / 2, "plain_weight": 4}


def test_contrast_metrics() -> None:
    metrics: dict[str, Tensor] = {}
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    losses.SupCon()(embeddings, torch.tensor([0, 0, 0, 1]), metrics=metrics)
    assert float(metrics["anchors"]) == 3
    assert float(metrics["positives_per_anchor"]) == pytest.approx(6 / 4)
    assert float(metrics["positive_cosine"]) == pytest.approx(1 / 3)
    assert float(metrics["negative_cosine"]) == pytest.approx(-2 / 3)


def test_learned_scale_stays_positive() -> None:
    loss = losses.NormFace(3, 4)
    assert loss.learned_scale is not None
    with torch.no_grad():
        loss.learned_scale.fill_(-5.0)
    metrics: dict[str, Tensor] = {}
    loss(torch.randn(2, 4), torch.tensor([0, 1]), metrics=metrics)
    assert float(metrics["scale"]) == pytest.approx(0.01)
    assert dict(losses.NormFace(3, 4, learn_scale=False).named_parameters()).keys() == {"weight"}


def test_importing_losses_imports_torch_and_nothing_heavier() -> None:
    heavy = ("ray", "deepspeed", "mlflow", "optuna", "timm", "torchvision", "sklearn", "pydantic")
    code = f"import sys, armillary.losses; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_loss_is_found_in_one_place() -> None:
    """A stranger's training loop imports from ``armillary.losses`` and need not know the files."""
    missing = []
    for found in pkgutil.iter_modules(losses.__path__):
        module = importlib.import_module(f"armillary.losses.{found.name}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, nn.Module)
            if own and not name.startswith("_") and getattr(losses, name, None) is not value:
                missing.append(f"{found.name}.{name}")
    assert missing == []
