"""Queue, bank and centre: against plain Python, over two workers, through a state dict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary import collectives
from armillary.components.bank import MemoryBank, encode_all, gather_by_index
from armillary.components.center import Center
from armillary.components.held import HostBuffers
from armillary.components.queue import Queue
from armillary.losses.instances import cosines_at
from armillary.losses.tensors import normalize
from armillary.objectives import Batch, registry
from armillary.testing import steps
from armillary.testing.gloo_pool import shared_pool

gloo = pytest.mark.xdist_group("gloo")


def mine(values: Tensor) -> Tensor:
    share = len(values) // collectives.world_size()
    return values[collectives.rank() * share : (collectives.rank() + 1) * share]


def test_a_queue_wraps_around() -> None:
    queue = Queue(5, (1,), columns=("tag",))
    queue.rows.copy_(torch.arange(5.0)[:, None])
    for step, values in enumerate(((10, 11), (12, 13), (14, 15))):
        queue.hold(step, torch.tensor(values, dtype=torch.float32)[:, None], tag=torch.tensor(values))
        queue.write()
        if step == 1:
            assert len(queue) == 4
            assert queue.filled().tolist() == [True] * 4 + [False]
    assert queue.rows[:, 0].tolist() == [15, 11, 12, 13, 14]
    assert queue.column("tag").tolist() == [15, 11, 12, 13, 14]
    assert int(queue.pointer) == 1
    assert len(queue) == 5
    assert queue.filled().all()


def test_more_keys_than_room() -> None:
    one, many = Queue(3, (1,), start="zeros"), Queue(3, (1,), start="zeros")
    for step, value in enumerate(torch.arange(8.0)):
        one.hold(step, value.view(1, 1))
        one.write()
    many.hold(0, torch.arange(8.0)[:, None])
    many.write()
    assert torch.equal(many.rows, one.rows)
    assert torch.equal(many.pointer, one.pointer)


def test_micro_batches_make_one_write_and_old_steps_are_dropped() -> None:
    queue = Queue(6, (1,), start="zeros")
    queue.hold(0, torch.tensor([[7.0]]))  # a step that never ended
    queue.hold(1, torch.tensor([[1.0], [2.0]]))
    queue.hold(1, torch.tensor([[3.0]]))
    queue.write()
    queue.write()
    assert queue.rows[:, 0].tolist() == [1, 2, 3, 0, 0, 0]


def test_what_a_queue_refuses() -> None:
    with pytest.raises(ValueError, match="capacity 0"):
        Queue(0, (2,))
    with pytest.raises(ValueError, match="keeps"):
        Queue(2, (2,)).hold(0, torch.zeros(1, 2), label=torch.zeros(1))


def test_the_start_of_queue_and_bank() -> None:
    for rows in (Queue(50, (4,)).rows, MemoryBank(50, (4,)).rows):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))
    assert not Queue(5, (2, 3), start="zeros").rows.any()


def written(keys: Tensor, indices: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three steps of a queue, a bank and a centre on this worker's part."""
    torch.manual_seed(0)
    queue, bank, center = Queue(7, (3,), columns=("index",)), MemoryBank(9, (3,)), Center(3, 0.8)
    for step in range(3):
        part, index = mine(keys[step]), mine(indices[step])
        queue.hold(step, part, index=index)
        bank.hold(step, index, part)
        center.hold(step, mine(outputs[step]))
        queue.write()
        bank.write(momentum=0.4)
        center.update()
    return queue.rows, queue.column("index"), bank.rows, center.value


@gloo
def test_two_workers_write_what_one_does() -> None:
    torch.manual_seed(1)
    keys, outputs = torch.randn(3, 4, 3), torch.randn(3, 6, 5, 3)
    # The same sample twice in a batch, on two workers and on one.
    indices = torch.tensor([[0, 5, 5, 2], [8, 8, 1, 0], [3, 5, 6, 7]])
    single = written(keys, indices, outputs)
    for found in shared_pool().run(written, keys, indices, outputs):
        for value, expected in zip(found, single, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_a_bank_against_a_loop() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(6, (4,))
    slow = bank.rows.clone()
    for step in range(3):
        index, rows = torch.tensor([[1, 4, 1], [0, 4, 2], [3, 3, 3]])[step], torch.randn(3, 4)
        before = slow.clone()
        for position, row in zip(index.tolist(), rows, strict=True):
            mixed = 0.3 * before[position] + 0.7 * row
            slow[position] = mixed / mixed.norm()
        bank.hold(step, index, rows)
        bank.write(momentum=0.3)
    torch.testing.assert_close(bank.rows, slow)
    assert bank.written.tolist() == [True] * 5 + [False]
    torch.testing.assert_close(bank.lookup(torch.tensor([4, 0])), slow[[4, 0]])


def test_a_bank_stays_on_the_host_and_is_seen_on_the_device() -> None:
    kept = {host: MemoryBank(4, (2,), host=host) for host in (True, False)}
    start = kept[True].stored.clone()
    for host, bank in kept.items():
        nn.Sequential(bank).to("meta")
        assert bank.stored.device.type == ("cpu" if host else "meta")
        assert bank.rows.device.type == bank.written.device.type == "meta"
        index = torch.tensor([3, 1], device="meta")
        if not host:
            assert bank.lookup(index).device.type == bank.known(index).device.type == "meta"
    # Rows arrive where the bank is, and those that are asked for where the index is.
    bank, rows, index = kept[True], normalize(torch.randn(2, 2)), torch.tensor([3, 1])
    bank.hold(0, index, rows)
    bank.write(momentum=0.5)
    assert torch.equal(bank.lookup(index), normalize(torch.lerp(rows, start[index], 0.5)))
    assert bank.known(torch.arange(4)).tolist() == [False, True, False, True]
    places = torch.tensor([[0, 3], [1, 1]])
    assert cosines_at(torch.randn(2, 2, device="meta"), bank.stored, places.to("meta")).device.type == "meta"
    beside = MemoryBank(4, (2,), host=True).double()
    assert beside.rows.dtype == torch.float64
    assert beside.rows.data_ptr() == beside.stored.data_ptr()


@pytest.mark.parametrize(
    ("name", "option", "options"),
    [
        ("instadisc", "bank_host", {"estimator": "noise"}),
        ("instadisc", "bank_host", {"estimator": "softmax"}),
        ("pirl", "bank_host", {}),
        ("spcl", "bank_host", {}),
        ("arb", "bank_host", {"formulation": "survey"}),
        ("swav", "queue_host", {"queue_size": 16, "queue_start": 0}),
        ("mice", "queue_host", {}),
        ("nce", "queue_host", {}),
    ],
)
def test_where_rows_are_kept_changes_no_bit(name: str, option: str, options: dict[str, Any]) -> None:
    traces = [
        steps.train_case(steps.Case(registry.get(name), {**options, option: host}), 3, torch.float32)
        for host in (True, False)
    ]
    objective = steps.Case(registry.get(name), {**options, option: True}).build()
    assert any(module.host for module in objective.modules() if isinstance(module, HostBuffers))
    assert traces[0].losses == traces[1].losses
    for found, expected in ((traces[0].gradients, traces[1].gradients), (traces[0].buffers, traces[1].buffers)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def queue_of(model: nn.Sequential) -> Queue:
    (queue,) = model
    assert isinstance(queue, Queue)
    return queue


def test_a_queue_stays_on_the_host_and_is_seen_on_the_device() -> None:
    keys, labels = torch.randn(2, 3), torch.tensor([5, 6])
    kept = {host: nn.Sequential(Queue(4, (3,), columns=("label",), host=host)) for host in (True, False)}
    for host, model in kept.items():
        queue = queue_of(model.to("meta"))
        assert queue.stored.device.type == ("cpu" if host else "meta")
        for seen in (queue.rows, queue.filled(), queue.column("label")):
            assert seen.device.type == "meta"
    # Keys arrive where the queue is; that it has moved changes nothing of what is kept.
    queue = queue_of(kept[True])
    queue.hold(0, keys, label=labels)
    queue.write()
    assert torch.equal(queue.stored[:2], keys)
    assert queue.get_buffer("column_label").tolist() == [5, 6, -1, -1]
    beside = Queue(4, (3,), host=True).double()
    assert beside.rows.dtype == torch.float64
    assert beside.rows.data_ptr() == beside.stored.data_ptr()


def test_state_goes_through_a_checkpoint() -> None:
    torch.manual_seed(0)
    queue, bank = Queue(5, (2,), columns=("label",)), MemoryBank(5, (2,))
    queue.hold(0, torch.randn(3, 2), label=torch.arange(3))
    queue.write()
    bank.hold(0, torch.tensor([1]), torch.randn(1, 2))
    bank.write()
    for module, twin in ((queue, Queue(5, (2,), columns=("label",))), (bank, MemoryBank(5, (2,)))):
        twin.load_state_dict(copy.deepcopy(module.state_dict()))
        for name, value in module.named_buffers():
            assert torch.equal(twin.get_buffer(name), value), name


def test_a_center_is_the_mean_of_everything() -> None:
    center = Center(2, momentum=0.5)
    center.update()
    assert not center.value.any()
    center.hold(0, torch.tensor([[2.0, 4.0]]))
    center.hold(0, torch.tensor([[[0.0, 0.0], [4.0, 8.0]]]))
    center.update()
    assert center.value.tolist() == [1.0, 2.0]
    center.hold(1, torch.empty(0, 2))
    center.update()
    assert center.value.tolist() == [1.0, 2.0]


def encoded(images: Tensor) -> tuple[Tensor, Tensor, bool, Tensor]:
    """A pass over a data set whose two halves are of different length; index 3 does not occur."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    bounds = {1: [(0, 7)], 2: [(0, 2), (2, 7)]}[collectives.world_size()][collectives.rank()]
    index = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    parts = [slice(start, min(start + 2, bounds[1])) for start in range(bounds[0], bounds[1], 2)]
    batches = [Batch((images[part],), index[part]) for part in parts]
    rows, seen = encode_all(batches, lambda batch: model(batch.views[0]), 8, model)
    bank = MemoryBank(8, (3,), start="zeros")
    bank.refresh(rows, seen)
    return rows, seen, model[1].training, bank.rows


@gloo
def test_a_pass_over_the_data_of_workers_with_unequal_parts() -> None:
    images = torch.randn(7, 2, generator=torch.Generator().manual_seed(3))
    single = encoded(images)
    assert single[1].tolist() == [True] * 3 + [False] + [True] * 4
    assert single[2]
    assert not single[0][3].any()
    torch.testing.assert_close(single[3], single[0])
    for found in shared_pool().run(encoded, images):
        torch.testing.assert_close(found[0], single[0])
        assert torch.equal(found[1], single[1])


def test_a_sample_that_comes_twice() -> None:
    rows, seen = gather_by_index(torch.tensor([2, 0, 2]), torch.tensor([[1.0], [5.0], [3.0]]), 4)
    assert rows[:, 0].tolist() == [5, 0, 2, 0]
    assert seen.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="more workers than images"):
        encode_all([], lambda batch: batch, 4)
