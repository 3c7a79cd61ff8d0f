"""Decoders of promptable models trained from cached embeddings, with boxes and without prompts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

pytest.importorskip("segment_anything", reason="extra sam is not installed")
pytest.importorskip("timm", reason="extra sam is not installed")

import medseg
from medseg import box_prompts
from medseg.box_prompts import jittered, picture
from medseg.boxes import box_of, ellipse
from medseg.finetuning import promptable_of, score_boxes
from medseg.models import sam_layouts
from medseg.models.sam import PromptableModel, load_promptable
from medseg.models.sam_layouts import LAYOUTS, Layout

ENCODER = partial(
    sam_layouts.tiny_vit, reduce=False, widths=(8, 8, 16, 16), depths=(1,) * 4, heads=(1, 1, 2, 2), windows=(4,) * 4
)
SMALL = Layout(ENCODER, 32, 4, frozenset({"box"}), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), channels=32)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a training starts from: a small model with random weights."""
    monkeypatch.setitem(LAYOUTS, "lite-medsam", SMALL)
    torch.manual_seed(0)
    torch.save(PromptableModel("lite-medsam", SMALL).state_dict(), tmp_path / "small.pth")
    return f"lite-medsam:{tmp_path / 'small.pth'}"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tiny.write_dataset(tmp_path / "data")


def encoder_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_boxes_train_the_decoder_alone(start: str, dataset: Path, tmp_path: Path) -> None:
    config = tiny.config(
        dataset,
        tmp_path / "run",
        model="sam-med-box",
        init=start,
        epochs=6,
        batch=4,
        cache=tmp_path / "cache",
    )
    run = medseg.train(config)
    history = json.loads((run.path / "history.json").read_text())
    facts = json.loads((run.path / "training.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"] - 0.02
    before, after = promptable_of(start), load_promptable(str(run.path))
    assert after.fingerprint == before.fingerprint
    for name, tensor in before.image_encoder.state_dict().items():
        assert torch.equal(tensor, after.image_encoder.state_dict()[name]), name
    prompts = after.prompt_encoder.state_dict()
    assert all(torch.equal(t, prompts[n]) for n, t in before.prompt_encoder.state_dict().items())
    rows = run.evaluation().rows
    assert {row["case"] for row in rows} == set(run.validation_ids()) and len(rows) == 4
    best = max([(facts["iou_before"], facts["dice_before"]), *((h["iou"], h["dice"]) for h in history)])
    assert np.mean([row["dice"] for row in rows]) == pytest.approx(best[1], abs=1e-6)
    assert (run.path / "report.html").is_file() and not (run.path / "cache").exists()
    scores = score_boxes(run.path, medseg.load_dataset(dataset), tmp_path / "cache", slices=12, device="cpu")
    assert set(scores) == {"before", "after", "ellipse"}
    assert min(row["dice"] for row in scores["ellipse"].rows) > 0.85  # balls
    assert [r["case"] for r in scores["after"].rows] == [r["case"] for r in scores["before"].rows]
    with pytest.raises(ValueError, match="draw boxes with medseg contour --model"):
        medseg.Predictor.load(run, "cpu")


def test_embeddings_are_made_once(start: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": "sam-med-box", "init": start, "epochs": 1, "cache": tmp_path / "cache"}
    first = medseg.train(tiny.config(dataset, tmp_path / "run", **values))
    monkeypatch.setattr(PromptableModel, "encode", None)  # a call would be a TypeError
    again = medseg.train(tiny.config(dataset, tmp_path / "again", **values))
    before, after = (load_file(run.path / "weights.safetensors") for run in (first, again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_without_prompts_a_run_predicts_as_a_unet_does(start: str, dataset: Path, tmp_path: Path) -> None:
    config = tiny.config(dataset, tmp_path / "run", model="sam-med", init=start, epochs=3, batch=4)
    run = medseg.train(config)
    assert run.plan.model == "sam-med" and run.plan.orientation == "LPI"
    weights = load_file(run.path / "weights.safetensors")
    for name, tensor in promptable_of(start).image_encoder.state_dict().items():
        assert torch.equal(tensor, weights[f"encoder.{name}"]), name
    history = json.loads((run.path / "history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"]
    image, _ = tiny.case(9)
    labels = medseg.predict(run.path, image, device="cpu")
    assert labels.array.shape == image.geometry.shape
    labels.geometry.require_close(image.geometry, "prediction")


def test_boxes_lie_around_the_structure_and_are_moved_outwards() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:9, 20:31] = True
    assert box_of(mask).tolist() == [20, 5, 30, 8]
    random = np.random.default_rng(0)
    moved = np.array([jittered(box_of(mask), mask.shape, random) for _ in range(300)])
    most = 20 / 1024 * 60
    assert (moved[:, :2] <= [20, 5]).all() and (moved[:, 2:] >= [30, 8]).all()
    assert np.abs(moved - box_of(mask)).max(0) == pytest.approx(most, rel=0.05)
    edge = jittered(np.array([0, 0, 59, 39], np.float32), mask.shape, random)
    assert edge.tolist() == [0, 0, 59, 39]


def test_ellipse_touches_the_sides_of_its_box() -> None:
    mask = ellipse(np.array([5, 8, 24, 17], np.float32), (30, 40))
    assert box_of(mask).tolist() == [5, 8, 24, 17]
    assert mask.sum() == pytest.approx(np.pi * 10 * 5, rel=0.03)


def test_pictures_have_the_column_first() -> None:
    image = np.arange(12.0, dtype=np.float32).reshape(1, 3, 4)  # i runs along columns, j along rows
    seen = picture(image)
    assert seen.shape == (3, 4, 3) and seen.min() == 0 and seen.max() == 1
    np.testing.assert_allclose(seen[2].numpy(), np.round(image[0].T / 11 * 255) / 255)
    assert picture(np.zeros((3, 5, 6), np.float32)).shape == (3, 6, 5)


def test_bad_requests_are_refused(start: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"init must be lite-medsam, .*got 'imagenet'"):
        medseg.train(tiny.config(dataset, tmp_path / "run", model="sam-med", init="imagenet"))
    with pytest.raises(ValueError, match="resume must go with another model than sam-med-box"):
        medseg.train(tiny.config(dataset, tmp_path / "run", model="sam-med-box", init=start, resume=True))
    monkeypatch.setattr(box_prompts, "MIN_PIXELS", 10_000)
    with pytest.raises(ValueError, match="cases must show a structure"):
        medseg.train(tiny.config(dataset, tmp_path / "run", model="sam-med-box", init=start))
