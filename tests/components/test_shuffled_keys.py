"""Keys that are normalised in other company than their queries: in one process, and over two workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary import collectives
from armillary.components.normalization import PartBatchNorm, PartBatchNormAct, SyncBatchNorm, convert_batch_norm
from armillary.components.shuffled_keys import ShuffledKeys
from armillary.objectives import registry
from armillary.testing import steps
from armillary.testing.gloo_pool import shared_pool

gloo = pytest.mark.xdist_group("gloo")
ROWS, DIM = 8, 3


def encoder(part: int) -> nn.Module:
    torch.manual_seed(0)
    return convert_batch_norm(nn.Sequential(nn.Linear(DIM, 4), nn.BatchNorm1d(4)), part or None)


def images() -> Tensor:
    # Rows that lie far apart, so that it matters which are normalised together.
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, ROWS + 1)[:, None]


def mine(values: Tensor) -> Tensor:
    share = len(values) // collectives.world_size()
    return values[collectives.rank() * share : (collectives.rank() + 1) * share]


def made(part: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """This worker's keys, and the buffers afterwards."""
    network = encoder(part)
    (keys,) = ShuffledKeys(part, seed=5)(network, [mine(images())], mine(torch.arange(ROWS)), step)
    return keys, {name: buffer.clone() for name, buffer in network.named_buffers()}


def test_each_part_is_torchs_batch_norm() -> None:
    torch.manual_seed(0)
    norm = PartBatchNorm(3)
    norm.part = 3
    rows, plain = torch.randn(8, 3, 2), nn.BatchNorm1d(3)
    found = norm(rows)
    expected = [nn.BatchNorm1d(3)(part) for part in (rows[:4], rows[4:])]  # 8 rows: two parts of at least 3
    torch.testing.assert_close(found, torch.cat(expected))
    means = [part.mean(dim=(0, 2)) for part in (rows[:4], rows[4:])]
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(dim=0))
    # Fewer rows than a part are one, and in evaluation mode it is torch's.
    norm, small = PartBatchNorm(3), torch.randn(2, 3)
    norm.part = 3
    torch.testing.assert_close(norm(small), plain(small))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)
    torch.testing.assert_close(norm.eval()(rows), plain.eval()(rows))


def test_conversion_keeps_what_an_objective_chose() -> None:
    timm = pytest.importorskip("timm")
    model = convert_batch_norm(timm.create_model("test_efficientnet.r160_in1k", pretrained=False, num_classes=0), 4)
    kinds = {type(module) for module in model.modules() if isinstance(module, (PartBatchNorm, SyncBatchNorm))}
    assert PartBatchNormAct in kinds
    convert_batch_norm(model)
    assert kinds == {type(module) for module in model.modules() if isinstance(module, (PartBatchNorm, SyncBatchNorm))}
    assert {module.part for module in model.modules() if isinstance(module, PartBatchNorm)} == {4}


def test_keys_come_back_in_order_from_other_company() -> None:
    network, rows, index = encoder(4), images(), torch.arange(ROWS)
    unshuffled = network(rows)
    shuffle = ShuffledKeys(4, seed=5)
    found = [shuffle(network, [rows], index, step)[0] for step in (0, 0, 1)]
    assert not torch.allclose(found[0], unshuffled)
    assert torch.equal(found[0], found[1]), "the order is a function of the step"
    assert not torch.allclose(found[0], found[2])
    # Each key is that of its own image: normalised with itself alone (running statistics), order is all that is left.
    (evaluated,) = shuffle(network.eval(), [rows], index, 0)
    torch.testing.assert_close(evaluated, network(rows).detach())


def test_views_are_shuffled_each_for_itself() -> None:
    network, rows = encoder(4), images()
    first, second = ShuffledKeys(4, seed=5)(network, [rows, rows], torch.arange(ROWS), 0)
    assert not torch.allclose(first, second)


@gloo
def test_two_workers() -> None:
    for step in range(3):
        shuffled, synchronised = (shared_pool().run(made, part, step) for part in (ROWS // 2, 0))
        keys, together = (torch.cat([part[0] for part in parts]) for parts in (shuffled, synchronised))
        # What one process makes of the whole batch: in order, and not what statistics of all workers give.
        torch.testing.assert_close(keys, made(ROWS // 2, step)[0])
        torch.testing.assert_close(together, made(0, step)[0])
        assert not torch.allclose(keys, together, atol=0.1)
        for name, buffer in made(ROWS // 2, step)[1].items():
            assert torch.equal(shuffled[0][1][name], shuffled[1][1][name])
            torch.testing.assert_close(shuffled[0][1][name], buffer)


def statistics_of(part: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over this worker's own rows of what leaves the batch norm."""
    network = encoder(part)
    output = network(mine(images()))
    return output.mean(dim=0).detach(), output.std(dim=0, unbiased=False).detach()


@gloo
def test_statistics_are_a_workers_own() -> None:
    for mean, spread in shared_pool().run(statistics_of, ROWS // 2):
        torch.testing.assert_close(mean, torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(spread, torch.ones(4), atol=1e-3, rtol=0)
    assert all(float((spread - 1).abs().max()) > 0.1 for _, spread in shared_pool().run(statistics_of, 0))


def gradients(name: str, options: dict[str, Any]) -> tuple[set[str], set[str], bool]:
    """Parameters with a gradient after a step of an objective, those it has in the teacher; whether batch norms are."""
    case = steps.Case(registry.get(name), options)
    objective = convert_batch_norm(case.build())
    whole = case.batch()
    half = len(whole.index) // dist.get_world_size()
    objective(whole.rows(slice(dist.get_rank() * half, (dist.get_rank() + 1) * half))).loss.backward()
    learned = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    fixed = {name for name, _ in objective.named_parameters() if name.startswith("teacher.")}
    return learned, fixed, any(isinstance(module, PartBatchNorm) for module in objective.modules())


@gloo
@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "looc", "pcl", "hcsc", "mice", "kcl", "tsc", "mochi"])
def test_gradient_reaches_the_query_encoder_alone(name: str) -> None:
    for batch_norm in ("shuffled", "sync"):
        for learned, fixed, parts in shared_pool().run(gradients, name, {"batch_norm": batch_norm}):
            assert fixed
            assert not learned & fixed
            assert any(parameter.startswith("encoder.") for parameter in learned)
            assert parts == (batch_norm == "shuffled")


def test_a_network_without_batch_norm_is_not_shuffled() -> None:
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            seen.append(rows)
            return rows

    rows = images()
    (keys,) = ShuffledKeys(2, seed=0)(Watched(), [rows], torch.arange(ROWS), 0)
    assert torch.equal(seen[0], rows)
    assert torch.equal(keys, rows)
