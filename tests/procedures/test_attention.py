"""Where a transformer looks, and where the person is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from armillary.cli.main import main
from armillary.components.attention import class_attention
from armillary.components.backbones import build_encoder
from armillary.components.transformers import TransformerEncoder
from armillary.data.identities import IdentitiesSpec, render_with_outlines
from armillary.data.importers import import_dataset
from armillary.procedures.attention import AttentionOptions, judge_attention, overlap
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec, TrainJob
from armillary.training.model import save_encoder
from armillary.training.records import create_run

BACKBONE = {"name": "small_vit", "embedding_dim": 32, "patch": 8}


def network(seed: int) -> TransformerEncoder:
    torch.manual_seed(seed)
    encoder = build_encoder(BackboneSpec(**BACKBONE), in_channels=3, image_size=(32, 32)).eval()
    assert isinstance(encoder, TransformerEncoder)
    return encoder


def finished(encoder: Any, backbone: dict[str, Any], size: tuple[int, int] = (32, 32)) -> str:
    job = TrainJob.model_validate(
        {"data": {"name": "identities_small"}, "backbone": backbone, "objective": {"name": "arcface"}}
    )
    run = create_run(job, "0" * 16)
    save_encoder(run.path / "model", encoder, job, 3, size)
    run.update(status="finished")
    return run.run_id


def test_outlines_are_where_the_person_is() -> None:
    spec = IdentitiesSpec(seed=3, size=48, difficulty=0.2)
    images, outlines = render_with_outlines(spec, 12)
    assert images.shape == (12, 48, 48, 3)
    assert outlines.shape == (12, 48, 48)
    # The head is in the middle, the corners above it are background, and both are of some size.
    assert outlines[:, 20:28, 22:26].all()
    assert not outlines[:, :3, :3].any()
    assert not outlines[:, :3, -3:].any()
    assert ((outlines.mean(axis=(1, 2)) > 0.2) & (outlines.mean(axis=(1, 2)) < 0.8)).all()
    again, same = render_with_outlines(spec, 5)
    assert np.array_equal(again, images[:5])
    assert np.array_equal(same, outlines[:5])


def test_overlap_is_its_definition() -> None:
    encoder, images = network(1), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    truth = torch.zeros(3, 32, 32, dtype=torch.bool)
    truth[:, 8:24, 5:20] = True
    expected = []
    for picture, heads in enumerate(class_attention(encoder, images)):
        best = 0.0
        for head in heads:
            order = sorted(((float(value), at) for at, value in enumerate(head.flatten())), reverse=True)
            held, kept = 0.0, set[int]()
            for value, at in order:
                if held >= 0.6 * float(head.sum()):
                    break
                held, kept = held + value, kept | {at}
            mask = torch.zeros(32, 32, dtype=torch.bool)
            for at in kept:
                row, column = divmod(at, 4)
                mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
            both, either = (mask & truth[picture]).sum(), (mask | truth[picture]).sum()
            best = max(best, float(both / either))
        expected.append(best)
    assert overlap(encoder, images, truth, 0.6, batch_size=2).tolist() == pytest.approx(expected)


def test_the_command(armillary_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_dataset("identities_small")
    run_id = finished(network(0), BACKBONE)
    with pytest.raises(SystemExit) as caught:
        main(["attention", run_id, "--images", "20", "--json"])
    assert not caught.value.code
    found = json.loads(capsys.readouterr().out)
    # The run's weights are those that the untrained network of seed 0 begins with.
    assert found["gain"] == 0
    assert found["trained"] == found["untrained"]
    assert 0 < found["trained"] < 1
    assert 0.2 < found["whole_image"] < 0.8
    assert Path(found["files"][0]).is_file()
    other = judge_attention(run_id, AttentionOptions(images=20, seed=1))
    assert not torch.equal(other.trained, other.untrained)


def test_networks_that_cannot_be_looked_into(armillary_home: Path) -> None:
    import_dataset("identities_small")
    plain: dict[str, Any] = {"name": "small_convnet", "embedding_dim": 16}
    encoder = build_encoder(BackboneSpec(**plain), in_channels=3, image_size=(32, 32))
    with pytest.raises(UserError, match="no class token"):
        judge_attention(finished(encoder, plain))
    wide = build_encoder(BackboneSpec(**BACKBONE), in_channels=3, image_size=(32, 64))
    with pytest.raises(UserError, match="32 x 64"):
        judge_attention(finished(wide, BACKBONE, (32, 64)))
