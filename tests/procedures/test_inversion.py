"""Inversion: worked numbers, and pictures out of a trained network that stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.cli.main import main
from armillary.evaluation.grids import save_grid
from armillary.procedures.inversion import (
    InversionOptions,
    invert,
    invert_run,
    statistics_distance,
    total_variation,
    watched_statistics,
)
from armillary.procedures.trained import load_trained
from armillary.spec.errors import UserError


def test_worked_numbers() -> None:
    activations = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mean, variance = torch.tensor([2.0, 5.0]), torch.tensor([2.0, 3.0])
    assert float(statistics_distance(activations, mean, variance)) == pytest.approx(2.15956955, abs=1e-6)
    assert float(statistics_distance(activations, mean, variance, squared=True)) == pytest.approx(2.55555556, abs=1e-6)


def test_statistics_agree_when_they_are_the_batch_s_own() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, momentum=1.0)
    images = torch.randn(5, 3, 4, 4)
    layer(images)
    assert layer.running_var is not None
    layer.running_var.copy_(images.transpose(0, 1).flatten(1).var(1, unbiased=False))
    layer.eval()
    with watched_statistics(layer, 10.0) as terms:
        layer(images)
        layer(images + 1)
    assert float(terms[0]) == pytest.approx(0, abs=1e-5)
    assert float(terms[1]) == pytest.approx(3**0.5, abs=1e-4)
    layer(images)
    assert len(terms) == 2  # nobody watches any more


def test_total_variation_is_its_definition() -> None:
    image = torch.tensor([[[[1.0, 3.0], [4.0, 8.0]]]])
    norms = [(2**2 + 4**2) ** 0.5, (3**2 + 5**2) ** 0.5, 7.0, 1.0]
    assert float(total_variation(image)) == pytest.approx(sum(norms))
    assert float(total_variation(torch.full((2, 3, 4, 4), 0.5))) == 0


def test_without_statistics_it_is_activation_maximisation() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    encoder(torch.rand(4, 1, 8, 8))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def loss(embeddings: Tensor) -> Tensor:
        return -embeddings[:, 0].mean()

    options = InversionOptions(steps=30, batch=4, bn=0, tv=0, l2=0, jitter=0)
    pictures, _ = invert(encoder, loss, (1, 8, 8), options)
    encoder.eval()
    with torch.no_grad():
        assert loss(encoder(pictures)) < loss(encoder(torch.rand(4, 1, 8, 8))) - 0.4
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_grids(tmp_path: Any) -> None:
    from PIL import Image

    save_grid(torch.rand(2, 3, 1, 32, 24), tmp_path / "new" / "grid.png")
    assert Image.open(tmp_path / "new" / "grid.png").size == (3 * (24 * 3 + 2) + 2, 2 * (32 * 3 + 2) + 2)
    with pytest.raises(ValueError, match="grid"):
        save_grid(torch.rand(3, 1, 8, 8), tmp_path / "bad.png")


@pytest.mark.slow
def test_a_person_is_drawn_from_a_trained_network(run_id: str, capsys: Any) -> None:
    number = load_trained(run_id).class_number(0)
    with pytest.raises(SystemExit) as caught:
        main(["invert", run_id, "--identity", str(number), "--steps", "60", "--batch", "8", "--json"])
    assert not caught.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["recognised"] >= 0.9
    assert found["cosine"] > 0.3
    assert found["files"][0].endswith(f"evaluation/inversion-{number}.png")


@pytest.mark.slow
def test_who_cannot_be_drawn(run_id: str) -> None:
    held_out = int(load_trained(run_id).data.evaluation.label[0])
    with pytest.raises(UserError, match="never saw"):
        invert_run(run_id, str(held_out))
    with pytest.raises(UserError, match=r"0\.\.29"):
        invert_run(run_id, "99")
    with pytest.raises(UserError, match="person-00003"):
        invert_run(run_id, "person-0003")
