"""The conformance suite: what every objective must pass, ours and those of plug-ins.

Each objective is tried with its default hyperparameters and with every other value of its options (switches and
choices). A check that cannot hold for a method is waived on the class, ``waivers = {"gradcheck": "targets are
detached"}``; a waived check must then really fail.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from armillary.objectives import Batch, Objective, hyperparameters, names
from armillary.objectives.bases import ClassHeadObjective
from armillary.objectives.registry import get
from armillary.spec.errors import UserError
from armillary.spec.spaces import load_space
from armillary.testing import steps, tiny
from armillary.testing.convergence import converge, falling
from armillary.testing.gloo_pool import GlooPool, shared_pool
from armillary.testing.steps import Case

# Modalities whose first view is an image, which a loss can be differentiated by.
IMAGES = ("image", "image_text")


def cases(cls: type[Objective]) -> list[Case]:
    """The defaults, and each switch and choice at its other values."""
    variants = [Case(cls)]
    for key, field in cls.Hyperparameters.model_fields.items():
        values: tuple[Any, ...] = ()
        if field.annotation is bool:
            values = (True, False)
        elif get_origin(field.annotation) is Literal:
            values = get_args(field.annotation)
        variants += [Case(cls, {key: value}) for value in values if value != field.default]
    return variants


class ObjectiveSuite:
    """Subclass as ``TestSomething``; ``objectives`` are registered names, ``None`` takes all that are registered.

    The distributed check sends the class to other processes, so that its module must be importable.
    """

    objectives: Sequence[str] | None = None

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Parametrises ``cls`` over objectives and ``case`` over objectives and their options."""
        chosen = [get(name) for name in (names() if cls.objectives is None else cls.objectives)]
        if "objective_class" in metafunc.fixturenames:
            metafunc.parametrize("objective_class", chosen, ids=[item.name for item in chosen])
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", [case for item in chosen for case in cases(item)], ids=str)

    @pytest.fixture(autouse=True)
    def _waived(self, request: pytest.FixtureRequest) -> None:
        if "case" in request.fixturenames:
            case, check = request.getfixturevalue("case"), request.node.originalname.removeprefix("test_")
            values = tiny.hyperparameters(case.cls, case.options).model_dump()
            which = ["", f"[{case}]", *(f"[{name}={value}]" for name, value in values.items())]
            reason = next(filter(None, (case.cls.waivers.get(check + part) for part in which)), None)
            if reason:
                request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    @pytest.fixture
    def pool(self) -> GlooPool:
        """Two gloo processes, the same ones for the whole session."""
        return shared_pool()

    # What is declared.

    def test_documented(self, objective_class: type[Objective]) -> None:
        """One sentence first, a source, and a description of every hyperparameter."""
        first = (objective_class.__doc__ or "").strip().split("\n")[0]
        assert len(first) > 20, "its docstring does not say what it is"
        assert first.endswith(".")
        assert objective_class.citation.authors
        assert objective_class.citation.title
        assert objective_class.family
        for key, field in objective_class.Hyperparameters.model_fields.items():
            assert field.description, f"{key} has no description"

    def test_defaults_are_legal(self, objective_class: type[Objective]) -> None:
        """Every default exists, and its numbers have a legal range."""
        fields = objective_class.Hyperparameters.model_fields
        assert not [key for key, field in fields.items() if field.is_required()]
        values = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
        assert objective_class.Hyperparameters(**values).model_dump() == values
        schema = objective_class.Hyperparameters.model_json_schema()["properties"] if fields else {}
        for key, entry in schema.items():
            if entry.get("type") in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & set(entry), f"{key} has no lower bound"
                assert {"maximum", "exclusiveMaximum"} & set(entry), f"{key} has no upper bound"

    def test_search_space(self, objective_class: type[Objective]) -> None:
        """Its search space exists, stays inside the legal ranges and holds the defaults."""
        space, fields = load_space(objective_class.name), objective_class.Hyperparameters.model_fields
        for key, searched in space.items():
            section, _, option = key.partition(".")
            if section == "objective":
                for end in searched.ends():
                    hyperparameters(objective_class.name, {option: end})
                default = fields[option].get_default(call_default_factory=True)
                low, high = searched.low, searched.high
                between = low is not None and high is not None and low <= default <= high
                assert between or default in searched.ends(), f"{key}: the default, {default}, is not searched"

    def test_hyperparameters_round_trip(self, case: Case) -> None:
        """Through JSON and back nothing changes, and nothing can be changed in place."""
        values = tiny.hyperparameters(case.cls, case.options)
        assert case.cls.Hyperparameters.model_validate_json(values.model_dump_json()) == values

    def test_unknown_key(self, objective_class: type[Objective]) -> None:
        """A key that does not exist is a user's mistake, named."""
        with pytest.raises(UserError, match="no_such_key"):
            hyperparameters(objective_class.name, {"no_such_key": 1})

    # What one batch gives.

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_finite_scalar(self, case: Case, dtype: torch.dtype) -> None:
        """A finite scalar of the input's type, metrics that are finite, detached scalars; an accuracy is a share."""
        output = case.build(dtype=dtype)(case.batch(dtype=dtype))
        assert output.loss.shape == ()
        assert output.loss.dtype == dtype
        assert torch.isfinite(output.loss)
        assert output.loss.requires_grad
        assert output.metrics
        for name, value in output.metrics.items():
            assert value.shape == (), name
            assert not value.requires_grad, name
            assert torch.isfinite(value), name
            if "accuracy" in name or name.endswith("_share"):
                assert 0 <= value <= 1, name

    def test_autocast(self, case: Case) -> None:
        """Under bfloat16 autocast the loss is float32 and close to float32's; the encoder here computes nothing."""
        encoder: Any = tiny.flat_encoder_for(case.needs)
        objective, batch = case.build(encoder=encoder, embedding_dim=encoder.embedding_dim), case.batch()
        exact = objective(batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch).loss
        assert loss.dtype == torch.float32
        assert abs(loss - exact) <= 0.05 * (1 + abs(exact))

    def test_inputs_unchanged(self, case: Case) -> None:
        """Neither forward nor backward writes to the batch."""
        batch = case.batch()
        before = copy.deepcopy(batch)
        case.build()(batch).loss.backward()
        for old, new in zip(_tensors(before), _tensors(batch), strict=True):
            assert torch.equal(old, new)

    def test_every_parameter_learns(self, case: Case) -> None:
        """Every trainable parameter, the encoder's included, gets a finite gradient that is not all zero."""
        objective = case.build()
        objective(case.batch()).loss.backward()
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 0, name

    def test_gradcheck(self, case: Case) -> None:
        """The gradient with respect to the first view is that of finite differences.

        Where views are no images, with respect to all parameters.
        """
        objective, batch = case.build(dtype=torch.float64), case.batch(8, dtype=torch.float64)
        torch.manual_seed(0)  # fast mode projects on random directions
        if case.needs.modality not in IMAGES:
            names, values = zip(*_trainable(objective), strict=True)

            def loss_of(*changed: Tensor) -> Tensor:
                parameters = dict(zip(names, changed, strict=True))
                return functional_call(copy.deepcopy(objective), parameters, (batch,)).loss  # type: ignore[no-any-return]

            assert torch.autograd.gradcheck(loss_of, values, fast_mode=True)
            return

        # Two random directions instead of fast mode, which looks at every pixel once more where it finds a difference:
        # that is what objectives that waive this check would wait for.
        directions = torch.randn(2, *batch.views[0].shape, dtype=torch.float64)
        directions = directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)

        def loss(amounts: Tensor) -> Tensor:
            view = batch.views[0] + torch.tensordot(amounts, directions, dims=1)
            changed = Batch((view, *batch.views[1:]), batch.index, batch.fields, batch.parameters)
            # A copy: statistics that a forward pass moves must not drift from one evaluation to the next.
            return copy.deepcopy(objective)(changed).loss  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(loss, (torch.zeros(2, dtype=torch.float64, requires_grad=True),))

    def test_batch_order(self, case: Case) -> None:
        """The order of the samples does not matter."""
        objective, batch = case.build(dtype=torch.float64), case.batch(dtype=torch.float64)
        order = torch.randperm(steps.BATCH, generator=torch.Generator().manual_seed(3))
        loss, shuffled = (copy.deepcopy(objective)(some).loss for some in (batch, tiny.take(batch, order)))
        torch.testing.assert_close(shuffled, loss, rtol=1e-9, atol=1e-9)

    # Batches with little to learn from.

    @pytest.mark.parametrize("labels", [[1] * 8, [0, 1, 2, 3], [2]], ids=["one_class", "all_distinct", "batch_of_one"])
    def test_degenerate_batch(self, case: Case, labels: list[int]) -> None:
        """A finite loss with finite gradients; never NaN."""
        objective = case.build()
        output = objective(case.batch(len(labels), labels=torch.tensor(labels)))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert all(torch.isfinite(gradient).all() for gradient in steps.gradients(objective).values())
        assert all(torch.isfinite(value) for value in output.metrics.values())

    def test_zero_embeddings(self, case: Case) -> None:
        """An encoder that answers zero gives a finite loss and finite gradients."""
        objective = case.build()
        for parameter in objective.encoder.parameters():
            nn.init.zeros_(parameter)
        loss = objective(case.batch()).loss
        loss.backward()
        assert torch.isfinite(loss)
        largest = max(float(gradient.abs().max()) for gradient in steps.gradients(objective).values())
        assert largest < 1e6

    def test_not_a_number_is_not_hidden(self, case: Case) -> None:
        """A sample that is not a number, or a parameter where views hold none, makes the loss not a number."""
        objective, batch = case.build(), case.batch()
        if case.needs.modality in IMAGES:
            batch.views[0][5] = torch.nan
        else:
            with torch.no_grad():
                next(objective.encoder.parameters()).fill_(torch.nan)
        assert torch.isnan(objective(batch).loss)

    def test_label_out_of_range(self, case: Case) -> None:
        """A head names the label that it has no row for; other objectives take any label."""
        labels = torch.arange(steps.BATCH) % tiny.NUM_CLASSES
        labels[3] = 99
        objective, batch = case.build(), case.batch(labels=labels)
        if isinstance(objective, ClassHeadObjective):
            with pytest.raises(ValueError, match=r"label 99 .* 4 classes"):
                objective(batch)
        else:
            assert torch.isfinite(objective(batch).loss)

    # Over time and workers.

    def test_two_workers_equal_one(self, case: Case, pool: GlooPool) -> None:
        """Two steps in float64: losses, metrics, gradients and buffers of two workers are those of one process."""
        parts = pool.run(steps.train_part, case, 2, torch.float64)
        whole, both = steps.train_case(case, 2, torch.float64), steps.joined(parts)
        assert both.losses == pytest.approx(whole.losses, rel=1e-8, abs=1e-8)
        for joint, single in zip(both.metrics, whole.metrics, strict=True):
            assert joint == pytest.approx(single, rel=1e-8, abs=1e-8)
        _assert_same(both.gradients, whole.gradients, 1e-8)
        _assert_same(both.buffers, whole.buffers, 1e-8)
        _assert_same(parts[0].gradients, parts[1].gradients, 0)
        _assert_same(parts[0].buffers, parts[1].buffers, 0)

    def test_two_workers_equal_one_in_float32(self, case: Case, pool: GlooPool) -> None:
        """One step in float32, to 1e-5, or to a few times the rounding that one process has for itself.

        What cancels exactly, as in the gradient of a bias before a batch norm, leaves the rounding of large terms.
        """
        both = steps.joined(pool.run(steps.train_part, case, 1, torch.float32))
        whole, exact = (steps.train_case(case, 1, dtype) for dtype in (torch.float32, torch.float64))
        assert both.losses == pytest.approx(whole.losses, rel=1e-5, abs=1e-5)
        rounding = max(_largest(whole.gradients[name] - value) for name, value in exact.gradients.items())
        _assert_same(both.gradients, whole.gradients, 1e-5, allowed=8 * rounding)

    def test_state_dict(self, case: Case) -> None:
        """After saving and loading into a differently initialised twin the next step is equal bit for bit."""
        objective, twin = case.build(seed=0), case.build(seed=1)
        steps.train(objective, [case.batch(seed=seed) for seed in range(2)])
        file = io.BytesIO()
        torch.save(objective.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
        traces = [steps.train(module, [case.batch(seed=2)]) for module in (objective, twin)]
        assert traces[0].losses == traces[1].losses
        _assert_same(traces[0].gradients, traces[1].gradients, 0)
        _assert_same(traces[0].buffers, traces[1].buffers, 0)

    def test_learns(self, case: Case) -> None:
        """Thirty Adam steps on one batch lower the loss."""
        objective, batch = case.build(), case.batch()
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = objective(batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]

    @pytest.mark.slow
    def test_converges(self, objective_class: type[Objective]) -> None:
        """A short training beats the untrained encoder by the margin the objective states, on held-out images.

        Where the objective says what falls, and where it learns from images without labels, that has fallen (the loss,
        if it says nothing else) and nothing has collapsed.
        """
        learned = converge(objective_class)
        assert learned.gain >= objective_class.convergence.margin, learned
        assert not falling(objective_class) or (learned.last < learned.first and learned.collapsed is None), learned

    def test_embedding(self, case: Case) -> None:
        """What is evaluated has the encoder's width and does not depend on the rest of the batch."""
        objective, images = case.build().eval(), case.batch().views[0]
        embeddings = objective.embed(images)
        assert embeddings.shape == (steps.BATCH, tiny.EMBEDDING_DIM)
        torch.testing.assert_close(objective.embed(images[:3]), embeddings[:3])


def _trainable(objective: Objective) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in objective.named_parameters() if value.requires_grad]


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.views, batch.index, *batch.fields.values()]


def _largest(values: Tensor) -> float:
    return float(values.double().abs().max()) if values.numel() else 0.0


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, allowed: float = 0.0) -> None:
    """Equal names, and values that differ by at most ``tolerance`` of the largest of all, or of 1, or by ``allowed``.

    Not of each tensor's own: the gradient of a bias before a batch norm is what rounding leaves of the others'.
    """
    assert found.keys() == expected.keys()
    largest = max([1.0, *map(_largest, expected.values())])
    for name, value in expected.items():
        difference = _largest(found[name].double() - value.double())
        assert difference <= max(tolerance * largest, allowed), (name, difference, largest)
