"""Class heads in chunks: the losses and gradients of the whole matrix, for any rules, without the matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from armillary import losses
from armillary.losses import class_chunks, class_head, class_rows
from armillary.losses.class_chunks import Rows
from armillary.losses.class_head import ClassHeadLoss, LinearHeadLoss, Samples, softmax_head_loss
from armillary.losses.tensors import half_products_pay, normalize
from armillary.testing.gloo_pool import shared_pool

CLASSES, DIM, BATCH = 11, 5, 8
# The chunk is 4 here: labels on its borders, one class twice, the last chunk not full.
LABELS = [0, 3, 4, 7, 8, 10, 3, 1]


class Curriculum(ClassHeadLoss):
    """Harder negatives are raised, with the target's and another column's help, and gradient to both."""

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return cosine - margin

    def columns(self, samples: Samples, target: Tensor) -> Mapping[str, Tensor]:
        return {"length": samples.norms}

    def non_target(self, cosine: Tensor, target: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        hard = cosine > target
        return torch.where(hard, cosine * (0.3 + cosine) + 0.1 * target, cosine + 0.01 * columns["length"])


class SubCenters(ClassHeadLoss):
    """Three rows a class, of which the nearest counts."""

    def __init__(self, num_classes: int, embedding_dim: int, **options: Any) -> None:
        super().__init__(num_classes, embedding_dim, **options)
        self.weight = nn.Parameter(torch.randn(num_classes, 3, embedding_dim))

    def similarity(self, embeddings: Tensor, rows: Rows | None = None) -> Tensor:
        weight = normalize((self.rows() if rows is None else rows)["weight"])
        return torch.einsum("nd,ckd->nck", normalize(embeddings), weight).amax(dim=2)


class NormScaled(LinearHeadLoss):
    """Linear with a bias, the scale each sample's length, the target from the own row's length."""

    def own_class(self, embeddings: Tensor, rows: Rows, similarity: Tensor) -> Mapping[str, Tensor]:
        return {"similarity": similarity, "length": torch.linalg.vector_norm(rows["weight"], dim=1, keepdim=True)}

    def target_of(self, samples: Samples) -> Tensor:
        return samples.similarity - 0.2 * samples.own["length"] * samples.norms

    def logit_scale(self, samples: Samples) -> Tensor:
        return samples.norms


class Squares(ClassHeadLoss):
    """Two sums over the classes: the softmax, and half the squared distance of the cosines to the one-hot label."""

    def head_terms(self, samples: Samples) -> losses.HeadTerms:
        others = samples.classes.sum(lambda cosine, _: cosine.square())
        terms = softmax_head_loss(self, samples)
        return dataclasses.replace(terms, losses=terms.losses + 0.5 * (others + (1 - samples.similarity).square()))


HEADS: dict[str, Any] = {
    "plain": lambda: ClassHeadLoss(CLASSES, DIM, scale=8.0),
    "arcface": lambda: losses.ArcFace(CLASSES, DIM, margin=0.4, scale=8.0),
    "learned_scale": lambda: losses.NormFace(CLASSES, DIM, scale=8.0),
    "linear": lambda: losses.Softmax(CLASSES, DIM),
    "no_bias": lambda: losses.Softmax(CLASSES, DIM, bias=False),
    "norm_scaled": lambda: NormScaled(CLASSES, DIM),
    "curriculum": lambda: Curriculum(CLASSES, DIM, margin=0.3, scale=8.0),
    "sub_centers": lambda: SubCenters(CLASSES, DIM, scale=8.0),
    "squares": lambda: Squares(CLASSES, DIM, scale=8.0),
}


def make(name: str) -> ClassHeadLoss:
    torch.manual_seed(1)
    head: ClassHeadLoss = HEADS[name]().double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def embeddings() -> Tensor:
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def dense(head: ClassHeadLoss, given: Tensor, labels: Tensor) -> Tensor:
    """The same loss over one ``(batch, classes)`` matrix and plain autograd."""
    similarity, own = head.similarity(given, head.rows()), labels[:, None]
    norms = given.norm(dim=1, keepdim=True)
    cosine = similarity.gather(1, own)
    if isinstance(head, Squares):
        squares = (similarity - functional.one_hot(labels, CLASSES)).square().sum(1).mean()
        return functional.cross_entropy(head.scale * similarity, labels) + 0.5 * squares
    if isinstance(head, NormScaled):
        target, scale, others = cosine - 0.2 * head.weight[labels].norm(dim=1, keepdim=True) * norms, norms, similarity
    else:
        target = head.target(cosine, torch.tensor(head.margin, dtype=torch.float64))
        others = head.non_target(similarity, target, {"length": norms})
        scale = getattr(head, "learned_scale", None)
        scale = torch.tensor(head.scale) if scale is None else scale
    return functional.cross_entropy(scale * others.scatter(1, own, target), labels)


def gradients(loss: Tensor, head: nn.Module, given: Tensor) -> dict[str, Tensor]:
    named = {"embeddings": given, **dict(head.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_chunks(monkeypatch)


def use_small_chunks(patch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 classes, pairs of 3 samples."""
    patch.setattr(class_chunks, "CHUNK", 4)
    patch.setattr(class_rows, "PAIRS", 3)


@pytest.mark.parametrize("name", HEADS)
def test_chunks_equal_the_matrix(name: str, small_chunks: None) -> None:
    head, given, labels = make(name), embeddings(), torch.tensor(LABELS)
    metrics: dict[str, Tensor] = {}
    loss, expected = head(given, labels, metrics=metrics), dense(head, given, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found, wanted = gradients(loss, head, given), gradients(expected, head, given)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=key)
    predicted = head.similarity(given, head.rows()).argmax(dim=1)
    assert metrics["accuracy"] == (predicted == labels).double().mean()


@pytest.mark.parametrize("name", ["arcface", "linear", "curriculum", "squares"])
def test_gradcheck(name: str, small_chunks: None) -> None:
    head, given, labels = make(name), embeddings(), torch.tensor(LABELS)

    assert torch.autograd.gradcheck(lambda vectors: head(vectors, labels), (given,))


@pytest.mark.parametrize("name", ["plain", "curriculum", "linear"])
def test_the_nearest_class(name: str, small_chunks: None) -> None:
    head, given, labels = make(name), embeddings(), torch.tensor(LABELS)[:, None]
    samples = head._samples(given, labels, {}, None)
    expected = head.similarity(given, head.rows()).argmax(dim=1, keepdim=True)
    assert torch.equal(samples.predicted(), expected)
    assert torch.equal(head.head_terms(samples).correct, expected == labels)


@pytest.mark.parametrize("scale", [64.0, 1000.0])
@pytest.mark.parametrize("name", ["plain", "curriculum"])
def test_when_every_cosine_is_very_negative(name: str, scale: float, small_chunks: None) -> None:
    """exp(scale * (cos - 1)) would be zero for every class."""
    kind = {"plain": ClassHeadLoss, "curriculum": Curriculum}[name]
    head = kind(CLASSES, DIM, scale=scale)
    given = torch.ones(4, DIM) + 0.01 * torch.randn(4, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.weight.copy_(-torch.ones(CLASSES, DIM) + 0.01 * torch.randn(CLASSES, DIM))
    given.requires_grad_()
    loss, expected = head(given, torch.arange(4)), dense(head.double(), given.double(), torch.arange(4))
    head.float()
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    loss.backward()
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


def test_one_class_alone() -> None:
    head, given = ClassHeadLoss(1, DIM), torch.randn(3, DIM, requires_grad=True)
    loss = head(given, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert given.grad is not None
    assert not given.grad.any()
    assert not head.weight.grad.any()  # type: ignore[union-attr]


def test_two_backward_passes_and_two_losses() -> None:
    """What one pass leaves behind must not reach the next."""
    head, given, labels = make("arcface"), embeddings(), torch.tensor(LABELS)
    loss = head(given, labels)
    first = gradients_kept(loss, head, given)
    again = gradients_kept(loss, head, given)
    (head(given, labels) + head(given, labels)).backward()
    for key, value in first.items():
        assert torch.equal(value, again[key])
    torch.testing.assert_close(head.weight.grad, 2 * first["weight"])


def gradients_kept(loss: Tensor, head: nn.Module, given: Tensor) -> dict[str, Tensor]:
    named = {"embeddings": given, **dict(head.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


@pytest.mark.parametrize("frozen", ["weight", "embeddings"])
def test_only_what_is_asked_for(frozen: str) -> None:
    head, given, labels = make("arcface"), embeddings(), torch.tensor(LABELS)
    wanted = gradients(head(given, labels), head, given)
    (head.weight if frozen == "weight" else given).requires_grad_(False)
    head(given, labels).backward()
    found = {"weight": head.weight.grad, "embeddings": given.grad}
    assert found.pop(frozen) is None
    for key, value in found.items():
        assert value is not None
        torch.testing.assert_close(value, wanted[key])


def test_sampled_rows_without_an_engine(small_chunks: None) -> None:
    """The loss over the sampled classes alone; the others get no gradient."""
    head, given, labels = make("linear"), embeddings(), torch.tensor([0, 3, 4, 3])
    chosen = torch.tensor([0, 2, 3, 4, 9])
    head.row_sampler = lambda _: chosen
    loss = head(given[:4], labels)
    loss.backward()
    logits = head.similarity(given[:4], head.rows())[:, chosen]
    torch.testing.assert_close(loss, functional.cross_entropy(logits, torch.searchsorted(chosen, labels)))
    assert head.weight.grad is not None
    assert set(head.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == set(chosen.tolist())


def test_no_matrix_is_kept() -> None:
    """Nothing saved for the backward pass has a size of batch x classes, or near it."""
    head, given = losses.ArcFace(20_000, 16), torch.randn(64, 16, requires_grad=True)
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        head(given, torch.arange(64))
    assert max(sizes) <= head.weight.numel() < 64 * 20_000


def test_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_head, "half_products_pay", lambda *_: True)
    torch.manual_seed(0)
    classes = 2 * class_chunks.CHUNK + 5
    head, labels = losses.ArcFace(classes, 64), torch.randint(0, classes, (32,))
    results = []
    for enabled in (False, True):
        given = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = head(given, labels)
        results.append((loss, gradients(loss, head, given)))
    (exact, wanted), (half, found) = results
    assert half.dtype == torch.float32
    assert half != exact
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=0)
    for key, value in wanted.items():
        assert functional.cosine_similarity(found[key].flatten(), value.flatten(), dim=0) > 0.999, key


@pytest.mark.parametrize("amx", [False, True])
def test_autocast_narrows_products_where_that_is_quicker(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    capable = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    half_products_pay.cache_clear()
    head, given = losses.ArcFace(class_chunks.CHUNK + 1, 16), torch.randn(4, 16)
    exact = head(given, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = head(given, torch.arange(4))
    half_products_pay.cache_clear()
    assert (found != exact) == amx
    assert half_products_pay("cuda", torch.float16)


def split_part(name: str, classes_of_two: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    """On a worker: its loss, metrics, gradients of its embeddings, own rows and averaged other parameters."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_chunks(patch)
        return split_step(name, classes_of_two)


def split_step(name: str, classes_of_two: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    head, given = make(name), embeddings()
    half = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
    labels = torch.tensor([0, 1, 1, 4] * 2 if classes_of_two else LABELS)
    head.split_rows(dist.get_rank(), dist.get_world_size())
    metrics: dict[str, Tensor] = {}
    loss = head(given[half], labels[half], metrics=metrics)
    loss.backward()
    found = {key: tensor.grad for key, tensor in {**head.rows(), **dict(head.named_parameters())}.items()}
    whole = {key: gradient for key, gradient in found.items() if gradient is not None}
    for key, _ in head.named_parameters():
        dist.all_reduce(whole[key])
        whole[key] /= dist.get_world_size()
    assert given.grad is not None
    return loss.detach(), given.grad, metrics["accuracy"], whole, head.state_dict()


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("first_worker_only", [False, True], ids=["spread", "one_owner"])
@pytest.mark.parametrize("name", HEADS)
def test_split_rows_equal_one_process(name: str, first_worker_only: bool, small_chunks: None) -> None:
    """Eleven rows over two workers, six and five; once with every label in the first worker's rows."""
    parts = shared_pool().run(split_part, name, first_worker_only)
    head, given = make(name), embeddings()
    labels = torch.tensor([0, 1, 1, 4] * 2 if first_worker_only else LABELS)
    metrics: dict[str, Tensor] = {}
    loss = head(given, labels, metrics=metrics)
    wanted = gradients(loss, head, given)
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss.detach())
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, wanted.pop("embeddings"))
    assert (parts[0][2] + parts[1][2]) / 2 == metrics["accuracy"]
    for key, value in wanted.items():
        is_row = key in head.row_names
        found = torch.cat([part[3][key] for part in parts]) if is_row else parts[0][3][key]
        torch.testing.assert_close(found, value, msg=key)
        assert key not in parts[0][4] or not is_row


def test_a_row_owned_by_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label 11 .* 11 classes"):
        make("plain")(embeddings(), torch.full((BATCH,), 11))
