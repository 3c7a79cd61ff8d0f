"""All folds as one: processes, resuming, ensembles, against the folds' own probabilities."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from scipy import special

import medseg
from medseg.config import TrainConfig
from medseg.cross_validation import train_folds
from medseg.ensemble import Ensemble, Members, member_runs
from medseg.inference import Predictor
from medseg.postprocessing import Postprocessing
from medseg.run import Run


def config(root: Path, **changes: object) -> TrainConfig:
    values = {
        "dataset": root / "set", "out": root / "cv", "fold": "all", "folds": 2, "epochs": 3, "precision": "32-true",
        "device": "cpu", "learning_rate": 0.01,
    }  # fmt: skip
    return TrainConfig.make(**{**values, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cv")
    tiny.write_dataset(root / "set", 4)
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    """Trained in two goes: the first finds the place of fold 1 taken."""
    tiny.plan().save(root / "plan.json")
    settings = config(root, plan=root / "plan.json")
    begun = Run.create(root / "cv", settings, tiny.plan(), [f"case{n}" for n in range(4)])
    taken = begun.path / "fold1"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years")
    resumed = settings.model_copy(update={"resume": True})
    with pytest.raises(
        ChildProcessError,
        match=r"got fold1: run folder must be new or a former run, .*\(see .*fold1.log.*other 1 can be",
    ):
        train_folds(resumed)
    assert (taken / "thesis.txt").read_text() == "years"
    record = Ensemble.load(begun.path / "ensemble.json")
    assert [f.name for f in record.folds] == ["fold0"]
    assert list(record.failed) == ["fold1"]
    assert len({r["case"] for r in begun.evaluation().rows}) == 2
    first = (begun.path / "fold0" / "weights.safetensors").stat().st_mtime_ns
    shutil.rmtree(taken)
    whole = train_folds(resumed)
    assert (whole.path / "fold0" / "weights.safetensors").stat().st_mtime_ns == first  # finished folds are kept
    return whole


def test_every_case_is_scored_once_by_the_fold_that_never_saw_it(run: Run) -> None:
    folds = [Run.open(run.path / f"fold{k}") for k in (0, 1)]
    ids = [set(fold.validation_ids()) for fold in folds]
    assert ids[0] | ids[1] == {f"case{n}" for n in range(4)}
    assert not ids[0] & ids[1]
    rows = {(r["case"], r["structure"]): r for r in run.evaluation().rows}
    assert len(rows) == 8
    for fold in folds:
        for row in fold.evaluation().rows:
            assert rows[row["case"], row["structure"]] == row
    assert run.evaluation().mean("dice") > 0.4
    record = Ensemble.load(run.path / "ensemble.json")
    assert [(f.name, f.cases) for f in record.folds] == [("fold0", 2), ("fold1", 2)]
    assert not record.failed
    choice = Postprocessing.of(run.path)
    assert choice is not None and choice.cases == 4
    names = {p.name for p in run.path.iterdir()}
    assert names >= {"config.json", "plan.json", "metrics.json", "metrics.csv", "report.html", "fold0.log"}
    assert "cache" not in names
    assert "cache" not in {p.name for fold in folds for p in fold.path.iterdir()}
    assert folds[0].plan == folds[1].plan == run.plan
    text = (run.path / "report.html").read_text()
    assert "fold1: 2 cases" in text and "chosen on 4 validation cases" in text


def test_prediction_is_the_mean_of_the_folds_probabilities(run: Run) -> None:
    """By hand from the probabilities of each fold; the image fits in one window, so the order of means is the same."""
    image, _ = tiny.case(60, shape=run.plan.patch)
    members = [Predictor.load(run.path / f"fold{k}", "cpu", raw=True) for k in (0, 1)]
    plan = run.plan.model_copy(update={"spacing": image.geometry.spacing})
    members = [Predictor(plan, m.network, m.device) for m in members]
    both = Predictor(plan, Predictor.load(run, "cpu", raw=True).network, torch.device("cpu"))
    image = medseg.reorient(image, "RAS")
    each = [np.asarray(m.predict(image, probabilities=True)[1].array) for m in members]
    labels, soft = both.predict(image, probabilities=True)
    np.testing.assert_allclose(soft.array, np.mean(each, 0), atol=1e-5)
    expected = np.array([0, 2, 5])[np.mean(each, 0).argmax(0)]
    assert (expected != labels.array).mean() < 1e-3  # equal up to ties
    assert np.array_equal(both.predict(image)[0].array, labels.array)


@pytest.mark.parametrize("overlapping", [False, True])
def test_members_against_numpy(overlapping: bool) -> None:
    torch.manual_seed(0)
    networks = [torch.nn.Conv3d(1, 3, 3, padding=1) for _ in range(3)]
    image = 30 * torch.randn(2, 1, 5, 6, 7)
    with torch.inference_mode():
        found = Members(networks, overlapping, 1.7)(image).double().numpy()
        each = [network(image).double().numpy() / 1.7 for network in networks]
        alone = Members(networks[:1], overlapping, 1.7)(image)
        torch.testing.assert_close(alone, networks[0](image) / 1.7)
    if overlapping:
        np.testing.assert_allclose(special.expit(found), np.mean(special.expit(each), 0), atol=1e-6)
    else:
        np.testing.assert_allclose(special.softmax(found, 1), np.mean(special.softmax(each, 2), 0), atol=1e-6)
    assert np.isfinite(found).all()


def test_folds_trained_apart_that_prepare_images_differently(run: Run, tmp_path: Path) -> None:
    """Without ensemble.json, and on other spacings: the probabilities are averaged on the grid of the image."""
    for k in (0, 1):
        shutil.copytree(run.path / f"fold{k}", tmp_path / "apart" / f"fold{k}")
    plan = json.loads((tmp_path / "apart" / "fold1" / "plan.json").read_text())
    plan["spacing"] = [1.2, 1.2, 1.9]
    (tmp_path / "apart" / "fold1" / "plan.json").write_text(json.dumps(plan))
    predictor = Predictor.load(tmp_path / "apart", "cpu")
    assert len(predictor.others) == 1
    image, _ = tiny.case(61)
    labels, soft = predictor.predict(image, probabilities=True)
    each = [
        np.asarray(
            Predictor.load(tmp_path / "apart" / f"fold{k}", "cpu", raw=True).predict(image, probabilities=True)[1].array
        )
        for k in (0, 1)
    ]
    np.testing.assert_allclose(soft.array, np.mean(each, 0), atol=1e-6)
    assert np.array_equal(predictor.predict(image)[0].array, labels.array)
    (tmp_path / "apart" / "fold1" / "metrics.json").unlink()
    assert len(member_runs(tmp_path / "apart")) == 1  # one that has not finished does not count
    (tmp_path / "apart" / "fold0" / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"folds must have finished, got none that has in .*apart"):
        Predictor.load(tmp_path / "apart", "cpu")


def test_what_must_stay_in_a_resumed_cross_validation(run: Run, root: Path) -> None:
    with pytest.raises(ValueError, match="seed must stay 0 in a resumed run, got 3"):
        train_folds(config(root, seed=3, resume=True))
    with pytest.raises(FileExistsError, match="use --resume, --force or another --out"):
        train_folds(config(root))


def test_ctrl_c_stops_the_children_after_a_checkpoint(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "cv"
    tiny.plan().save(tmp_path / "plan.json")
    settings = config(root, out=out, epochs=5000, plan=tmp_path / "plan.json")
    script = (
        "import signal, sys; from medseg.config import TrainConfig; from medseg.cross_validation import train_folds\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell are born ignoring it
        "train_folds(TrainConfig.model_validate_json(sys.argv[1]))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, settings.model_dump_json()], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        said_of_fold = out / "fold0.log"
        while not (said_of_fold.is_file() and "expecting" in said_of_fold.read_text()):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = [int(c) for c in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        parent.send_signal(signal.SIGINT)
        _, said = parent.communicate(timeout=120)
    finally:
        parent.kill()  # its child ends with it
    assert parent.returncode != 0
    assert "go on with the same command and --resume" in said
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert "stopped at step" in (out / "fold0.log").read_text()
    assert (out / "cache").is_dir()


def test_one_patient_has_no_folds(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labelled cases of 2 patients, got 1"):
        train_folds(config(root, out=tmp_path / "cv", group="(case)"))


def test_damaged_member(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "cv")
    path = tmp_path / "cv" / "fold1" / "weights.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"weights must fit the plan, got in .*fold1"):
        Predictor.load(tmp_path / "cv", "cpu")
