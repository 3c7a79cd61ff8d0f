"""Training, resuming, runs and prediction at small scale, end to end through files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import medseg
from medseg import training
from medseg.config import TrainConfig
from medseg.inference import _blank
from medseg.run import Run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("set"))


def config(dataset: Path, out: Path, **changes: object) -> TrainConfig:
    return tiny.config(dataset, out, **{"epochs": 4, **changes})


@pytest.fixture(scope="session")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return medseg.train(config(dataset, tmp_path_factory.mktemp("runs") / "run", epochs=12), tiny.plan())


def test_it_learns_and_the_run_is_whole(run: Run) -> None:
    history = json.loads((run.path / "history.json").read_text())
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    evaluation = run.evaluation()
    assert evaluation.mean("dice") > 0.85
    assert {r["structure"] for r in evaluation.rows} == {"bright", "dark"}
    assert len({r["case"] for r in evaluation.rows}) == 2  # a third of six
    names = {p.name for p in run.path.iterdir()}
    assert names >= {"config.json", "plan.json", "weights.safetensors", "checkpoint.safetensors", "metrics.json"}
    assert names >= {"history.json", "environment.json", "report.html", "tensorboard"}
    assert "cache" not in names
    assert not [n for n in names if n.startswith(".medseg")]
    text = (run.path / "metrics.json").read_text()
    assert "NaN" not in text
    row = json.loads(text)["cases"][0]
    assert {"case", "structure", "iou", "dice", "hd95_mm", "nsd", "volume_mm3", "reference_volume_mm3"} <= set(row)


def test_prediction_lies_on_the_scanners_grid_with_the_sets_labels(run: Run) -> None:
    image, truth = tiny.case(77, shape=(24, 17, 11))
    turned = medseg.reorient(image, "SPL")
    labels = medseg.predict(run.path, turned, device="cpu")
    assert labels.geometry == turned.geometry
    assert set(np.unique(labels.array)) == {0, 2, 5}
    assert labels.names == {2: "bright", 5: "dark"}
    (row, other) = medseg.evaluate(medseg.reorient(labels, truth.geometry.orientation), truth, surface=False).rows
    assert row["dice"] > 0.8
    assert other["dice"] > 0.8
    same = medseg.predict(run.path, image, device="cpu")
    moved = np.asarray(medseg.reorient(same, "SPL").array)
    assert (moved == labels.array).mean() > 0.999  # the answer does not hang on how the file stores its axes


def test_probabilities_agree_with_labels(run: Run) -> None:
    predictor = medseg.Predictor.load(run, "cpu")
    image, _ = tiny.case(5)
    labels, soft = predictor.predict(image, probabilities=True)
    assert soft is not None
    assert soft.geometry == image.geometry
    assert np.allclose(soft.array.sum(0), 1, atol=1e-4)
    plain, nothing = predictor.predict(image)
    assert nothing is None
    assert np.array_equal(plain.array, labels.array)
    assert np.array_equal(np.array([0, 2, 5])[soft.array.argmax(0)], labels.array)


def test_interrupted_training_resumes_to_the_same_weights(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C in the middle leaves a checkpoint; --resume ends with the weights of a run that was never stopped."""
    whole = medseg.train(config(dataset, tmp_path / "whole", epochs=2), tiny.plan())
    step = training.Learner._train_step

    def stopped(self: training.Learner, *given: object) -> float:
        self.stop_asked = self.step == 24
        return step(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(training.Learner, "_train_step", stopped)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        medseg.train(config(dataset, tmp_path / "part", epochs=2), tiny.plan())
    assert "stopped at step 25; go on with the same command and --resume" in caplog.text
    assert (tmp_path / "part" / "checkpoint.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="must have finished"):
        Run.open(tmp_path / "part").evaluation()
    monkeypatch.setattr(training.Learner, "_train_step", step)
    part = medseg.train(config(dataset, tmp_path / "part", epochs=2, resume=True))
    a, b = (load_file(r.path / "checkpoint.safetensors") for r in (whole, part))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    with pytest.raises(ValueError, match="seed must stay 0 in a resumed run, got 3"):
        medseg.train(config(dataset, tmp_path / "part", epochs=2, resume=True, seed=3))


def test_minutes_end_the_training(dataset: Path, tmp_path: Path) -> None:
    run = medseg.train(config(dataset, tmp_path / "run", epochs=None, minutes=0.1), tiny.plan())
    assert json.loads((run.path / "training.json").read_text())["steps"] > 0
    assert run.evaluation().rows


def test_slices_of_volumes_with_a_2d_network(dataset: Path, tmp_path: Path) -> None:
    run = medseg.train(config(dataset, tmp_path / "run", epochs=5), tiny.plan(dims=2))
    assert run.evaluation().mean("dice") > 0.7
    labels = medseg.predict(run, dataset / "images" / "case0.nii.gz", device="cpu")
    assert labels.geometry.shape == (20, 18, 14)


def test_crf_is_chosen_by_validation_and_kept_with_the_run(run: Run) -> None:
    choice = medseg.crf_fit.fit_crf(run, device="cpu")
    assert (run.path / "crf.json").is_file()
    assert choice.parameters is None  # two validation cases are too few to tell
    assert medseg.crf_fit.crf_of_run(run) == choice.parameters
    assert "2 validation cases of 2 patients cannot show a gain" in choice.reason


def test_stopped_before_the_first_step_resumes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "prepare", stopped)
        medseg.train(config(dataset, tmp_path / "run", epochs=1), tiny.plan())
    assert "stopped while preprocessing; go on with the same command and --resume" in caplog.text
    run = medseg.train(config(dataset, tmp_path / "run", epochs=1, resume=True))
    assert run.evaluation().rows


def test_no_time_at_all_still_gives_one_step_and_weights(dataset: Path, tmp_path: Path) -> None:
    run = medseg.train(config(dataset, tmp_path / "run", epochs=None, minutes=1e-4), tiny.plan())
    assert (run.path / "weights.safetensors").is_file()


def test_blank_surroundings_are_background_but_bright_plateaus_are_not() -> None:
    """A saturated lesion has as little contrast as the air; only what holds the image's lowest value is blank."""
    image = torch.full((1, 1, 20, 18, 16), -2.0)
    image[0, 0, 10:, :, :] = torch.linspace(-1, 1, 16)
    image[0, 0, 13:, 4:12, 4:12] = 3.0  # a plateau
    blank = _blank(image, torch.tensor([-2.0]))[0]
    assert blank[:8].all()
    assert not blank[8:].any()


class TestBadInput:
    def test_a_run_is_not_overwritten(self, run: Run, dataset: Path) -> None:
        with pytest.raises(FileExistsError, match="use --resume, --force or another --out"):
            medseg.train(config(dataset, run.path), tiny.plan())

    def test_force_deletes_nothing_but_a_former_run(self, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years")
        with pytest.raises(FileExistsError, match=r"must be new or a former run, got .* with thesis.txt"):
            medseg.train(config(dataset, tmp_path, force=True), tiny.plan())
        assert (tmp_path / "thesis.txt").read_text() == "years"
        for name in ("plan.json", "config.json", "validation.json"):  # of a run, or of medseg plan --out
            (tmp_path / name).write_text("{}")
        with pytest.raises(FileExistsError, match=r"must be new or a former run, got .* with thesis\.txt"):
            medseg.train(config(dataset, tmp_path, force=True), tiny.plan())
        tiny.write_dataset(tmp_path / "cache")
        (tmp_path / "thesis.txt").rename(tmp_path / "cache" / "thesis.txt")
        with pytest.raises(FileExistsError, match="must not hold the data set"):
            medseg.train(config(tmp_path / "cache", tmp_path, force=True), tiny.plan())
        (tmp_path / "cache" / "thesis.txt").rename(tmp_path / "thesis.txt")
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="run folder must be a folder, got the file"):
            medseg.train(config(dataset, tmp_path / "file"), tiny.plan())
        assert (tmp_path / "thesis.txt").exists()

    def test_label_outside_the_plan(self, dataset: Path, tmp_path: Path) -> None:
        plan = tiny.plan()
        plan = plan.model_copy(update={"structures": plan.structures[:1]})
        with pytest.raises(ValueError, match=r"labels must be in the plan \(2\), got 5 .dark. in case case"):
            medseg.train(config(dataset, tmp_path / "run"), plan)

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"run must be a folder that medseg train made"):
            medseg.predict(tmp_path, tiny.case(0)[0])

    def test_run_of_another_format(self, run: Run, tmp_path: Path) -> None:
        plan = json.loads((run.path / "plan.json").read_text())
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "format": 99}))
        with pytest.raises(ValueError, match=r"run must be of format 1, got 99 in .*; use the medseg version"):
            Run.open(tmp_path)

    def test_damaged_and_foreign_weights(self, run: Run, tmp_path: Path) -> None:
        for name in ("plan.json", "config.json"):
            (tmp_path / name).write_text((run.path / name).read_text())
        with pytest.raises(FileNotFoundError, match=r"run must hold weights\.safetensors"):
            Run.open(tmp_path).network()
        whole = (run.path / "weights.safetensors").read_bytes()
        (tmp_path / "weights.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="weights must fit the plan"):
            Run.open(tmp_path).network()
        plan = json.loads((run.path / "plan.json").read_text())
        (tmp_path / "plan.json").write_text(json.dumps({**plan, "features": [4, 6]}))
        (tmp_path / "weights.safetensors").write_bytes(whole)
        with pytest.raises(ValueError, match="weights must fit the plan"):
            Run.open(tmp_path).network()

    def test_wrong_number_of_channels(self, run: Run) -> None:
        image, _ = tiny.case(1)
        two = medseg.Volume(np.concatenate([image.array, image.array]), image.geometry)
        with pytest.raises(ValueError, match="image must have 1 channels as planned, got 2"):
            medseg.predict(run, two, device="cpu")

    def test_too_few_cases_for_the_folds(self, dataset: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="number of folds"):
            medseg.train(config(dataset, tmp_path / "run", folds=50), tiny.plan())
