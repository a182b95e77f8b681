"""Gathers and reductions over two processes: values, order, gradients."""

from __future__ import annotations

import os

import pytest
import torch

from armillary import collectives
from armillary.testing.gloo_pool import GlooPool, shared_pool


def gather() -> tuple[torch.Tensor, torch.Tensor]:
    local = torch.tensor([[1.0], [2.0]]) + 10 * collectives.rank()
    local.requires_grad_()
    rows = collectives.all_gather(local)
    # Every worker weighs the rows differently, so that the sum over workers shows.
    (rows[:, 0] * torch.arange(1, 5) * (1 + collectives.rank())).sum().backward()
    assert local.grad is not None
    return rows.detach(), local.grad


def test_all_gather() -> None:
    (rows0, gradient0), (rows1, gradient1) = shared_pool().run(gather)
    assert rows0.flatten().tolist() == rows1.flatten().tolist() == [1, 2, 11, 12]
    assert gradient0.flatten().tolist() == [3, 6]
    assert gradient1.flatten().tolist() == [9, 12]


def reduce() -> tuple[float, float, float, list[int], dict[str, int]]:
    local = torch.tensor(2.0 + collectives.rank(), requires_grad=True)
    total = collectives.all_reduce_sum(local)
    (total.square() * (1 + collectives.rank())).backward()
    assert local.grad is not None
    labels = collectives.gather_no_grad(torch.tensor([collectives.rank()]))
    value = collectives.broadcast_object({"rank": collectives.rank()})
    return float(total), float(local.grad), float(collectives.all_reduce_max(local)), labels.tolist(), value


def test_reductions() -> None:
    for total, gradient, largest, labels, value in shared_pool().run(reduce):
        assert total == 5
        assert gradient == 2 * 5 * (1 + 2)
        assert largest == 3
        assert labels == [0, 1]
        assert value == {"rank": 0}


def test_without_a_group_everything_is_the_identity() -> None:
    local = torch.randn(3, requires_grad=True)
    assert collectives.all_gather(local) is local
    assert collectives.all_reduce_sum(local) is local
    assert torch.equal(collectives.all_reduce_max(local), local)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)


def fail_on_one_rank() -> int:
    if collectives.rank() == 1:
        raise ArithmeticError("no such number")
    collectives.all_reduce_sum(torch.ones(1))  # waits for rank 1 until the pool ends it
    return 0


def process() -> int:
    return os.getpid()


@pytest.mark.slow
def test_pool_survives_a_failure_and_ends() -> None:
    with GlooPool() as pool:
        first = pool.run(process)
        assert pool.run(process) == first
        assert len({*first, os.getpid()}) == 3
        with pytest.raises(RuntimeError, match=r"(?s)rank 1.*ArithmeticError: no such number"):
            pool.run(fail_on_one_rank)
        second = pool.run(process)
        assert not set(first) & set(second)
    for pid in (*first, *second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
