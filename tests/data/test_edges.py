"""Edge lists: what is refused, and that a graph that came from a file is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from armillary.data.importers import import_dataset
from armillary.spec.errors import UserError
from armillary.spec.jobs import TrainJob
from armillary.training.preflight import plan


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        ("", {}, "holds no edges"),
        ("# nothing\n\n% here\n", {}, "holds no edges"),
        ("1\t2\n3\n", {}, r"edges.txt:2.*fewer than two cells"),
        ("1,2\n,3\n", {}, r"edges.txt:2.*fewer than two cells"),
        ("1 2\n" + "a" * 300 + " 3\n", {}, "more than 200 letters"),
        ("1,2\n", {"separator": "pipe"}, "separator"),
        ("a b\n", {"header": "yes"}, "holds no edges"),
    ],
)
def test_what_is_refused(text: str, options: dict[str, str], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        import_dataset("edges", "out", path, options=options)


def test_words_above_numbers_name_columns_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "edges.txt"
    path.write_text("user item\n1 2\n")
    assert len(import_dataset("edges", "named", path)) == 1
    assert len(import_dataset("edges", "plain", path, options={"header": "no"})) == 2


def test_an_imported_graph_is_trained_on(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    chosen = torch.rand(30, 20, generator=draw).topk(8).indices
    path = tmp_path / "edges.csv"
    path.write_text("user,item\n" + "".join(f"{user},{int(item)}\n" for user in range(30) for item in chosen[user]))
    import_dataset("edges", "mine", path)
    job = TrainJob.model_validate(
        {
            "data": {"name": "mine", "split": "sample"},
            "backbone": {"name": "lightgcn", "embedding_dim": 8},
            "objective": {"name": "simgcl"},
            "train": {"batch_size": 32},
            "evaluate": {"protocols": ["recommendation"]},
        }
    )
    ready = plan(job)
    objective = ready.build()
    batch = next(iter(ready.batches().epoch(0)))
    loss = objective(batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    table = objective.encoder.get_parameter("table.weight")
    assert table.shape == (50, 8)
    assert table.grad is not None
    assert table.grad.abs().max() > 0
