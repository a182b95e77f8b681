"""Checkpoint files: any slice comes back out of whatever pieces hold it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armillary.spec.errors import UserError
from armillary.training.shards import ShardReader, read_meta, write_meta, write_shard


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_any_split(tmp_path: Path, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    whole = torch.arange(size, dtype=torch.float32)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    folder = tmp_path / f"{size}-{'-'.join(map(str, cuts))}"
    folder.mkdir(exist_ok=True)
    for rank, (low, high) in enumerate(itertools.pairwise(cuts)):
        write_shard(folder, rank, {("param", "head.weight", low): whole[low:high]})
    reader = ShardReader(folder)
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start))
    assert torch.equal(reader.cut("param", "head.weight", start, length), whole[start : start + length])
    assert torch.equal(reader.whole("param", "head.weight"), whole)


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, {("param", "w", 0): torch.zeros(4)})
    write_shard(tmp_path, 1, {("param", "w", 4): torch.zeros(4)})
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete"):
        ShardReader(tmp_path).cut("param", "w", 2, 4)


def test_names_with_slashes_and_scalars(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, {("step", "a/b.c", 0): torch.tensor(7.0), ("param", "a/b.c", 0): torch.ones(2)})
    reader = ShardReader(tmp_path)
    assert reader.kinds("a/b.c") == ["param", "step"]
    assert reader.whole("step", "a/b.c").item() == 7.0


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_meta(tmp_path)
    write_meta(tmp_path, {"epoch": 3})
    assert read_meta(tmp_path) == {"epoch": 3}
