"""Losses over pairs and tuples: blocks, gradients, precision, empty batches, invariants, options."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from armillary import losses
from armillary.losses import blocks

SIZE, DIM = 22, 5
SMOOTH: list[Callable[..., nn.Module]] = [
    losses.Contrastive,
    losses.LiftedStructure,
    lambda **options: losses.MultiSimilarity(mining="all", **options),
    lambda **options: losses.Triplet(0.4, "all", soft=True, **options),
]
TUPLES: list[Callable[..., nn.Module]] = [
    *SMOOTH,
    lambda **options: losses.Triplet(0.4, "all", **options),
    lambda **options: losses.Triplet(0.4, "batch_hard", squared=False, **options),
    lambda **options: losses.Triplet(0.4, "semi_hard", **options),
    lambda **options: losses.MultiSimilarity(epsilon=0.2, **options),
    lambda **options: losses.Circle(0.25, 16.0, **options),
    lambda **options: losses.CrossVersionTriplet(**options),
]
BATCHES: list[Callable[[], nn.Module]] = [
    *TUPLES,
    losses.NPair,
    losses.RangeLoss,
    lambda: losses.RangeLoss(formulation="survey"),
    lambda: losses.Circle(0.25, 16.0, "whole_batch"),
    lambda: losses.LiftedStructure(formulation="survey"),
]


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, DIM, generator=draw, dtype=torch.float64).requires_grad_(), torch.arange(SIZE) % 7


def value_and_gradient(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward(torch.ones_like(value))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("make", [*BATCHES, losses.SupCon, lambda: losses.SupCon(mode="in")])
def test_blocks_do_not_show(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of 22 anchors, or one of 16 and one of 6."""
    whole = value_and_gradient(make(), *inputs())
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(value_and_gradient(make(), *inputs()), whole)


@pytest.mark.parametrize("reduction", ["mean_active", "mean_all", "sum"])
@pytest.mark.parametrize("make", TUPLES)
def test_reductions_are_those_of_the_anchors(make: Callable[..., nn.Module], reduction: str) -> None:
    """Gradients taken at once are those of the anchors' own losses, reduced by hand."""
    loss = make(reduction=reduction)
    value, gradient = value_and_gradient(loss, *inputs())
    metrics: dict[str, Tensor] = {}
    each, summed = value_and_gradient(make(reduction="none"), *inputs())
    loss(*inputs(), metrics=metrics)
    if isinstance(loss, losses.Contrastive) and reduction == "mean_active":
        return  # the mean of two kinds of pairs
    unit = next(name for name in ("pairs", "triplets", "anchors") if name in metrics)
    count = {"mean_all": metrics[unit], "mean_active": metrics["active"], "sum": torch.tensor(1.0)}[reduction]
    seen = 2 if unit == "pairs" else 1
    torch.testing.assert_close(value, each.sum() / (seen * count))
    torch.testing.assert_close(gradient, summed / (seen * count))


def test_anchors_of_different_weight() -> None:
    """A gradient that is not the same for all anchors computes the blocks again, and is right."""
    embeddings, labels = inputs()
    weights = torch.linspace(0.1, 2, SIZE, dtype=torch.float64)
    for make in TUPLES:
        (weighted,) = torch.autograd.grad((make(reduction="none")(embeddings, labels) * weights).sum(), embeddings)
        parts = [
            torch.autograd.grad(make(reduction="none")(embeddings, labels)[i] * weights[i], embeddings)[0]
            for i in range(SIZE)
        ]
        torch.testing.assert_close(weighted, torch.stack(parts).sum(0))


@pytest.mark.parametrize("make", SMOOTH)
def test_gradcheck(make: Callable[[], nn.Module]) -> None:
    loss, (embeddings, labels) = make(), inputs()
    assert torch.autograd.gradcheck(lambda given: loss(given, labels), (embeddings,))


@pytest.mark.parametrize("form", ["per_anchor", "whole_batch"])
def test_circle_holds_its_weights_constant(form: str) -> None:
    """dL/ds is the same as with plain tensors whose weights are detached, and not as with weights that are not."""
    embeddings, labels = inputs()
    _, found = value_and_gradient(losses.Circle(0.25, 4.0, form), embeddings, labels)
    same = labels[:, None] == labels[None, :]
    upper = torch.ones_like(same).triu(1) if form == "whole_batch" else ~torch.eye(SIZE, dtype=torch.bool)

    def gradient(hold: bool) -> Tensor:
        units = torch.nn.functional.normalize(embeddings)
        cosines = units @ units.T
        held = cosines.detach() if hold else cosines
        near = -4 * (1.25 - held).clamp_min(0) * (cosines - 0.75)
        far = 4 * (held + 0.25).clamp_min(0) * (cosines - 0.25)
        pull, push = near.masked_fill(~(same & upper), -torch.inf), far.masked_fill(same | ~upper, -torch.inf)
        if form == "whole_batch":
            pull, push = pull.reshape(1, -1), push.reshape(1, -1)
        loss = nn.functional.softplus(pull.logsumexp(1) + push.logsumexp(1)).mean()
        return torch.autograd.grad(loss, embeddings)[0]

    torch.testing.assert_close(found, gradient(True))
    assert (found - gradient(False)).abs().max() > 1e-4


@pytest.mark.parametrize("make", BATCHES)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0], [5, 5, 5, 5]], ids=["distinct", "one", "one_class"])
def test_little_to_learn_from(make: Callable[[], nn.Module], labels: list[int]) -> None:
    embeddings = torch.randn(len(labels), 3, requires_grad=True)
    metrics: dict[str, Tensor] = {}
    loss = make()(embeddings, torch.tensor(labels), metrics=metrics)
    loss.backward()
    assert torch.isfinite(loss)
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert float(metrics["empty"]) in (0.0, 1.0)
    if len(labels) == 1:
        assert float(metrics["empty"]) == 1


@pytest.mark.parametrize("make", BATCHES)
def test_equal_and_zero_embeddings(make: Callable[[], nn.Module]) -> None:
    for same in (torch.ones(8, 3), torch.zeros(8, 3)):
        loss, gradient = value_and_gradient(make(), same, torch.arange(8) % 3)
        assert torch.isfinite(loss)
        assert float(gradient.abs().max()) < 1e6


@pytest.mark.parametrize("make", BATCHES)
def test_half_precision_and_broken_inputs(make: Callable[[], nn.Module]) -> None:
    embeddings, labels = inputs()
    half = embeddings.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = make()(half, labels)
    found.backward()
    assert found.dtype == torch.float32
    exact, gradient = value_and_gradient(make(), half.float(), labels)
    torch.testing.assert_close(found.detach(), exact)
    assert half.grad is not None
    torch.testing.assert_close(half.grad.float(), gradient, rtol=1e-2, atol=1e-6)
    half = half.detach().clone()
    half[3, 1] = torch.nan
    assert torch.isnan(make()(half, labels))


@pytest.mark.parametrize("make", [losses.Contrastive, losses.LiftedStructure, losses.RangeLoss])
def test_translation_and_rotation(make: Callable[[], nn.Module]) -> None:
    embeddings, labels = inputs()
    turn, _ = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    expected = make()(embeddings, labels)
    torch.testing.assert_close(make()(embeddings @ turn + 3.0, labels), expected)


def test_lengths_do_not_matter() -> None:
    embeddings, labels = inputs()
    lengths = torch.linspace(0.2, 5, SIZE, dtype=torch.float64)[:, None]
    for loss in (losses.MultiSimilarity(epsilon=0.3), losses.Circle(0.25, 8.0), losses.CrossVersionTriplet()):
        torch.testing.assert_close(loss(embeddings * lengths, labels), loss(embeddings, labels))


def test_contrastive_scales() -> None:
    embeddings, labels = inputs()
    torch.testing.assert_close(
        losses.Contrastive(3.0)(3 * embeddings, labels), 9 * losses.Contrastive(1.0)(embeddings, labels)
    )


def test_n_pair_takes_its_order_from_outside() -> None:
    embeddings, labels = inputs()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    expected = losses.NPair()(embeddings, labels, order=torch.arange(SIZE))
    shuffled = losses.NPair()(embeddings[order], labels[order], order=order)
    torch.testing.assert_close(shuffled, expected)
    equal = losses.NPair(0.0)(torch.ones(6, 3), torch.arange(6) % 3)
    assert float(equal) == pytest.approx(torch.tensor(3.0).log().item())


def test_apart_keeps_samples_from_being_negatives() -> None:
    """Two images of one person: with the people as ``apart`` neither is a negative of the other's versions."""
    versions = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, people = torch.arange(4).repeat(2), torch.tensor([0, 0, 0, 0]).repeat(2)
    metrics: dict[str, Tensor] = {}
    assert float(losses.CrossVersionTriplet()(versions, images, apart=people, metrics=metrics)) == 0
    assert float(metrics["triplets"]) == 0
    assert float(losses.CrossVersionTriplet()(versions, images)) > 0


def test_wrong_options() -> None:
    for make in (
        lambda: losses.Contrastive(0.0),
        lambda: losses.Contrastive(reduction="median"),
        lambda: losses.ContrastivePairs(similar_is=2),
        lambda: losses.LiftedStructure(alpha=-1.0),
        lambda: losses.LiftedStructure(formulation="book"),
        lambda: losses.NPair(-1.0),
        lambda: losses.MultiSimilarity(alpha=0.0),
        lambda: losses.MultiSimilarity(epsilon=-0.1),
        lambda: losses.Circle(m=0.0),
        lambda: losses.Circle(form="class_level"),
        lambda: losses.CircleHead(3, 4, scale=0.0),
        lambda: losses.RangeLoss(k=0),
        lambda: losses.RangeLoss(margin=0.0),
        lambda: losses.CrossVersionTriplet(margin=-1.0),
    ):
        with pytest.raises(ValueError, match="found"):
            make()


def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that a step makes has the whole matrix's size."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2**12)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, Tensor):
                    largest = max(largest, item.untyped_storage().nbytes() // item.element_size())
            return result

    embeddings, labels = torch.randn(512, 8, requires_grad=True), torch.arange(512) // 8
    for loss in (losses.SupCon(), losses.Triplet(0.2, "all"), losses.MultiSimilarity(), losses.Circle()):
        with Largest():
            loss(embeddings, labels).backward()
    with Largest():
        losses.NTXent()(embeddings[:256], embeddings[256:]).backward()
    assert 0 < largest <= 16 * 512
