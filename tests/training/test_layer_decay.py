"""``optimizer.layer_decay``: which layer each parameter of a backbone belongs to, and what the engine makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from armillary import collectives
from armillary.components.backbones import build_encoder
from armillary.components.encoders import learning_rate_shares
from armillary.components.normalization import convert_batch_norm
from armillary.objectives import Batch, BuildContext, Citation, Hyperparameters, Objective, Output
from armillary.spec.errors import UserError
from armillary.spec.jobs import BackboneSpec, TrainJob
from armillary.spec.loading import load_job
from armillary.testing.gloo_pool import shared_pool
from armillary.training.engine import Engine
from armillary.training.optimizers import make_optimizer, set_learning_rate
from armillary.training.preflight import plan

DECAY = 0.5


def shares(name: str, **options: object) -> dict[str, float]:
    spec = BackboneSpec.model_validate({"name": name, "embedding_dim": 8, **options})
    encoder = build_encoder(spec, in_channels=3, image_size=(32, 32))
    found = learning_rate_shares(encoder, DECAY)
    return {key: found.get(id(value), 1.0) for key, value in encoder.named_parameters()}


def test_layers_of_a_transformer() -> None:
    """As in the released code of MAE: embedding 0, block i is i + 1, norm and head are the top, of depth + 1 layers."""
    for key, share in shares("small_vit", depth=3, positions="learned").items():
        if key.startswith("body.blocks."):
            assert share == DECAY ** (4 - (int(key.split(".")[2]) + 1)), key
        elif key.startswith(("body.norm.", "neck.")):
            assert share == 1, key
        else:
            assert share == DECAY**4, key


def test_a_timm_transformer_is_cut_alike() -> None:
    found = shares("timm/vit_tiny_patch16_224", depth=2)
    assert found["body.cls_token"] == found["body.pos_embed"] == found["body.patch_embed.proj.weight"] == DECAY**3
    assert found["body.blocks.0.norm1.weight"] == DECAY**2
    assert found["body.blocks.1.norm1.weight"] == DECAY
    assert found["neck.weight"] == 1


def test_stages_of_convolutional_networks() -> None:
    small = shares("small_convnet")
    assert [small[f"features.{number}.weight"] for number in (0, 2, 4, 8)] == [DECAY**3, DECAY**3, DECAY**2, DECAY]
    assert small["neck.weight"] == small["norm.weight"] == 1
    resnet = shares("timm/resnet18")
    assert resnet["body.conv1.weight"] == DECAY**5
    assert [resnet[f"body.layer{stage}.0.conv1.weight"] for stage in (1, 2, 3, 4)] == [
        DECAY ** (5 - s) for s in range(1, 5)
    ]
    assert resnet["neck.weight"] == 1


@pytest.mark.parametrize("name", ["text_transformer", "gin"])
def test_layers_without_images(name: str) -> None:
    encoder = build_encoder(BackboneSpec(name=name, embedding_dim=8), in_channels=20, image_size=(4, 12))
    found = learning_rate_shares(encoder, DECAY)
    rest = [key for key, value in encoder.named_parameters() if id(value) not in found]
    assert set(found.values()) == {DECAY ** (1 + number) for number in range(3)}
    assert all(key.startswith(("norm.", "neck.")) for key in rest)


def test_the_default_leaves_two_groups() -> None:
    encoder = build_encoder(BackboneSpec(name="small_vit"), in_channels=1, image_size=(16, 16))
    job = TrainJob.model_validate({"objective": {"name": "softmax"}})
    optimizer = make_optimizer(encoder, job.optimizer)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_a_backbone_without_layers_is_refused() -> None:
    job = load_job("recipes/sentences", ["optimizer.layer_decay=0.5", "backbone={name: word_vectors}"])
    with pytest.raises(UserError, match="word_vectors has no layers") as found:
        plan(job)  # type: ignore[arg-type]
    assert found.value.key == "optimizer.layer_decay"


class Toy(Objective):
    """A transformer whose gradients do not depend on what it has learned: the moves of a step are the rates."""

    name, family, citation = "toy", "test", Citation("nobody", "nothing")

    def build(self, context: BuildContext) -> None:
        self.head = nn.Linear(context.embedding_dim, 3)

    def forward(self, batch: Batch) -> Output:
        return Output(nn.functional.cross_entropy(self.head(self.encoder(batch.views[0])), batch.label))


def moves(zero: int) -> dict[str, float]:
    """How far one step of Adam moves each parameter: its learning rate, where the gradient is not 0."""
    torch.manual_seed(0)
    spec = BackboneSpec.model_validate({"name": "small_vit", "embedding_dim": 8, "depth": 2, "width": 24, "patch": 8})
    objective = Toy(Hyperparameters(), BuildContext(build_encoder(spec, in_channels=1, image_size=(16, 16)), 8, 3, 8))
    template = build_encoder(spec, in_channels=1, image_size=(16, 16))
    convert_batch_norm(objective)
    before = {key: value.detach().clone() for key, value in objective.encoder.named_parameters()}
    workers = collectives.world_size()
    job = TrainJob.model_validate(
        {
            "objective": {"name": "toy"},
            "optimizer": {"name": "adam", "weight_decay": 0.0, "layer_decay": DECAY},
            "train": {"batch_size": 8, "workers": workers, "zero": zero},
        }
    )
    engine = Engine(objective, job, torch.device("cpu"))
    try:
        draw = torch.Generator().manual_seed(1)
        images, labels = torch.rand(8, 1, 16, 16, generator=draw), torch.arange(8) % 3
        part = slice(collectives.rank() * 8 // workers, (collectives.rank() + 1) * 8 // workers)
        engine.step([Batch((images[part],), torch.arange(8)[part], {"label": labels[part]})], lr=0.01)
        after = dict(engine.encoder_copy(template).named_parameters())
        return {key: float((after[key].detach() - value).abs().max()) for key, value in before.items()}
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_moves_each_layer_at_its_own_rate(zero: int) -> None:
    for found in shared_pool().run(moves, zero):
        assert found["neck.weight"] == pytest.approx(0.01, rel=1e-2)
        assert found["body.blocks.1.mlp.fc1.weight"] == pytest.approx(0.01 * DECAY, rel=1e-2)
        assert found["body.blocks.0.mlp.fc1.weight"] == pytest.approx(0.01 * DECAY**2, rel=1e-2)
        assert found["body.patch_embed.proj.weight"] == pytest.approx(0.01 * DECAY**3, rel=1e-2)
