"""``armillary evaluate`` on files, through the real command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armillary.cli.main import main
from armillary.evaluation.protocols import evaluate
from armillary.evaluation.result import Pairs


@pytest.fixture
def command(capsys: Any) -> Any:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *map(str, arguments)])
        streams = capsys.readouterr()
        return int(caught.value.code or 0), streams.out, streams.err

    return run


@pytest.fixture
def files(blobs: Any, tmp_path: Any) -> Any:
    for name, part in (("test", slice(0, None, 2)), ("train", slice(1, None, 2))):
        points, labels = blobs(per_class=10, noise=1.5)
        np.savez(tmp_path / f"{name}.npz", embeddings=points[part], labels=labels[part])
    return tmp_path


def test_json_is_what_the_protocols_say(files: Any, command: Any) -> None:
    code, out, _ = command("--embeddings", files / "test.npz", "--json")
    stored = np.load(files / "test.npz")
    expected: dict[str, float] = {}
    for name in ("verification", "identification"):
        expected |= evaluate(name, stored["embeddings"], stored["labels"]).metrics
    assert code == 0
    assert json.loads(out)["metrics"] == expected


def test_a_gallery_opens_the_closed_set_protocols(files: Any, command: Any) -> None:
    arguments = ("--embeddings", files / "test.npz", "-p", "knn", "-p", "probe")
    code, out, err = command(*arguments)
    assert code == 2
    assert "--train FILE" in err
    assert out == ""
    code, out, _ = command(*arguments, "--train", files / "train.npz")
    assert code == 0
    assert "knn/top1" in out
    assert "probe/top1" in out


def test_plots_are_written_where_asked_only(files: Any, command: Any) -> None:
    before = set(files.iterdir())
    assert command("--embeddings", files / "test.npz")[0] == 0
    assert set(files.iterdir()) == before
    code, out, _ = command("--embeddings", files / "test.npz", "--plots", files / "new" / "plots")
    assert code == 0
    written = {path.name for path in (files / "new" / "plots").iterdir()}
    assert written == {"verification.npz", "identification.npz", "roc.png", "cmc.png"}
    assert all(name in out for name in written)


def test_columns_pairs_and_templates_stand_beside_the_embeddings(blobs: Any, tmp_path: Any, command: Any) -> None:
    points, labels = blobs(classes=6, per_class=10)
    np.savez(tmp_path / "all.npz", embeddings=points, labels=labels, quality=np.linspace(0, 1, 60), note=np.array("x"))
    (tmp_path / "pairs.csv").write_text(
        "first,second,same\n"
        + "".join(f"{i},{(i * 7 + 1) % 60},{int(i // 10 == (i * 7 + 1) % 60 // 10)}\n" for i in range(60))
    )
    rows = np.arange(60)
    np.savez(tmp_path / "templates.npz", row=rows, template=rows // 2 + 5, media=rows)
    np.savez(tmp_path / "matches.npz", first=[5, 5, 6, 5], second=[6, 12, 7, 34], same=[1, 0, 1, 0])
    options = ("--pairs", "pairs.csv", "--templates", "templates.npz", "--matches", "matches.npz", "--json")
    code, out, err = command("--embeddings", "all.npz", "--protocols", "verification,geometry,templates", *options)
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert "geometry/norm_quality_correlation" in metrics
    pairs = Pairs(rows, (rows * 7 + 1) % 60, labels == labels[(rows * 7 + 1) % 60])
    expected = evaluate("verification", points, labels, pairs=pairs).metrics
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["templates/auc"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    # Templates alone say which protocol is meant.
    code, out, _ = command("--embeddings", "all.npz", *options[2:])
    assert set(json.loads(out)["metrics"]) == {"templates/auc", "templates/eer"}


def test_collapse_is_printed_and_every_picture_drawn(blobs: Any, tmp_path: Any, command: Any) -> None:
    points, labels = blobs(classes=12, per_class=5)
    np.savez(tmp_path / "a.npz", embeddings=np.ones(16) + 1e-3 * points, labels=labels)
    code, _, err = command("--embeddings", "a.npz", "-p", "geometry,verification,identification", "--figures", "plots")
    assert code == 0
    assert "warning: the embeddings have collapsed to nearly one direction" in err
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"roc.png", "cmc.png", "reject.png", "angles.png", "map.png", "warnings.txt", "geometry.npz"} <= names
    for path in (tmp_path / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("some-run", "--pairs", "p.csv"), "--pairs"),
        (("--embeddings", "test.npz", "--matches", "m.csv"), "--templates FILE"),
        (("--embeddings", "test.npz", "--data", "orl"), "--data"),
        (("--embeddings", "test.npz", "--pairs", "p.csv"), "no such file"),
        ((), "either a run or --embeddings"),
        (("some-run", "--embeddings", "test.npz"), "either a run or --embeddings"),
        (("some-run",), "there is no run 'some-run'"),
        (("some-run", "--train", "train.npz"), "--train"),
        (("--embeddings", "none.npz"), "no such file"),
        (("--embeddings", "test.npz", "-p", "knnn"), "'knn'"),
    ],
)
def test_mistakes_cost_one_message_and_exit_code_2(
    files: Any, command: Any, monkeypatch: Any, arguments: Any, words: Any
) -> None:
    monkeypatch.chdir(files)
    code, out, err = command(*arguments)
    assert code == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err


@pytest.fixture
def run_id() -> str:
    """A run folder as training leaves it, with an untrained network, on the digits."""
    from armillary.components.backbones import build_encoder
    from armillary.spec.jobs import TrainJob
    from armillary.spec.loading import dump_job
    from armillary.training.model import save_encoder
    from armillary.training.rundir import RunDirectory, RunRecord

    job = TrainJob.model_validate(
        {
            "objective": {"name": "normface"},
            "data": {"name": "digits", "split": "sample"},
            "backbone": {"name": "small_convnet", "embedding_dim": 16},
            "evaluate": {"protocols": ["knn", "verification"], "flip": True},
            "seed": 5,
        }
    )
    run = RunDirectory.create(RunRecord(run_id="digits-0001", name="digits", status="finished"), dump_job(job))
    encoder = build_encoder(job.backbone, in_channels=1, image_size=(8, 8))
    save_encoder(run.path / "model", encoder, job, channels=1, image_size=(8, 8))
    return run.run_id


def test_a_run_is_judged_on_its_own_data_by_its_own_job(run_id: Any, command: Any) -> None:
    from armillary.data.splits import prepare
    from armillary.evaluation.suite import evaluate_encoder, metrics_of
    from armillary.spec.jobs import DataSpec
    from armillary.training.model import load_encoder
    from armillary.training.rundir import RunDirectory

    code, out, err = command("digits", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["subject"], found["seed"]) == (run_id, 5)
    data = prepare(DataSpec(name="digits", split="sample"), seed=5)
    encoder = load_encoder(RunDirectory.find(run_id))
    again = evaluate_encoder(encoder, data, ["knn", "verification"], flip=True, seed=5)
    assert found["metrics"] == pytest.approx(metrics_of(again))
    assert 0.2 < found["metrics"]["knn/top1"] < 1.0


def test_a_protocol_that_does_not_fit_the_split_is_refused(run_id: Any, command: Any) -> None:
    code, _, err = command(run_id, "-p", "clustering")
    assert code == 2
    assert "data.split" in err


def test_a_run_without_a_model_is_refused(run_id: Any, command: Any) -> None:
    from armillary.training.rundir import RunDirectory

    (RunDirectory.find(run_id).path / "model" / "model.json").unlink()
    code, _, err = command(run_id)
    assert code == 2
    assert "has no model" in err


def test_a_run_is_judged_on_a_whole_other_dataset_by_its_pairs(run_id: Any, command: Any) -> None:
    import pyarrow as pa

    from armillary.data.store import Record, write_dataset

    rng = np.random.default_rng(0)
    records = [Record(rng.integers(0, 256, (8, 8, 1), dtype=np.uint8), label) for label in range(5) for _ in range(4)]
    first, second = np.triu_indices(20, 1)
    pairs = pa.table({"first": first[::3], "second": second[::3], "same": first[::3] // 4 == second[::3] // 4})
    write_dataset("other", records, class_names=list("abcde"), tables={"pairs": pairs})
    code, out, err = command(run_id, "--data", "other", "-p", "verification", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["warnings"] == []
    genuine = int(np.sum(first[::3] // 4 == second[::3] // 4))
    # Rates are counts over the list's genuine pairs, not over all pairs.
    tar = found["metrics"]["verification/tar_at_far_1e-1"] * genuine
    assert tar == pytest.approx(round(tar))
    code, _, err = command(run_id, "--data", "digits", "-p", "verification")
    assert code == 2
    assert "trained on" in err


def test_a_run_is_judged_on_a_test_part_whose_classes_are_matched_by_name(run_id: Any, command: Any) -> None:
    from armillary.data.importers import ensure_dataset
    from armillary.data.store import Record, write_dataset

    digits = ensure_dataset("digits")
    images = [image for rows in digits.rows() for image in rows.images][:60]
    names, label = list(reversed(digits.manifest.class_names)), digits.column("label")[:60]
    # The same pictures under the same names, numbered the other way round: every neighbour at distance 0 votes.
    write_dataset("copies", [Record(i, 9 - int(c)) for i, c in zip(images, label, strict=True)], class_names=names)
    code, out, err = command(run_id, "--data", "copies", "-p", "knn,clustering", "--json")
    assert code == 0, err
    found = json.loads(out)["metrics"]
    assert found["knn/top1"] > 0.5
    assert "clustering/nmi" in found
    write_dataset("strangers", [Record(image, 0) for image in images], class_names=["nobody"])
    code, _, err = command(run_id, "--data", "strangers", "-p", "knn")
    assert code == 2
    assert "share no class name" in err


def test_flip_is_the_jobs_unless_told(run_id: Any, command: Any, tmp_path: Path) -> None:
    same, flipped, plain = (
        json.loads(command(run_id, "-p", "verification", "--json", *more)[1])["metrics"]
        for more in ((), ("--flip",), ("--no-flip",))
    )
    assert same == flipped
    assert same["verification/auc"] != plain["verification/auc"]
    np.savez(tmp_path / "some.npz", embeddings=np.eye(4), labels=[0, 0, 1, 1])
    code, _, err = command("--embeddings", str(tmp_path / "some.npz"), "--flip")
    assert code == 2
    assert "--flip" in err
