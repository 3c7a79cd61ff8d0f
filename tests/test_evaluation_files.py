"""Evaluation as a user runs it: files and folders of every kind, through the command."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import tiny
import torch
from evaluated import GRID, STRUCTURES, evaluate_json, medseg_command, moved, truth, write_folders

import medseg
from medseg import surface
from medseg.evaluation import evaluate
from medseg.io import write
from medseg.io.dicom_write import write_series
from medseg.report_evaluation import evaluate_predictions
from medseg.volume import Geometry, LabelMap, Volume


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_folders(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def test_every_format_gives_the_same_rows(tmp_path):
    """SEG, RTSTRUCT, NRRD, a folder of masks and NIfTI of one label map score alike against NIfTI, whichever side."""
    grid = Geometry.from_parts((24, 19, 9), (0.9, 1.3, 3.0), (-20, 30, 5), np.diag([-1.0, -1.0, 1.0]))
    write_series(Volume(np.zeros((1, *grid.shape), np.int16), grid), tmp_path / "series", modality="CT")
    series = medseg.read(tmp_path / "series")
    on_series = [replace(labels, geometry=series.geometry) for labels in (moved(truth(3), 1), truth(3))]
    names = ("a.nii.gz", "a.nrrd", "a.seg.dcm", "a.rtstruct.dcm")
    for folder, labels in zip("pr", on_series, strict=True):
        for name in names:
            medseg.write(labels, tmp_path / folder / name, source=tmp_path / "series")
    medseg.convert(tmp_path / "p" / "a.nii.gz", f"{tmp_path}/masks/", labels=True, split=True)
    want = {row["structure"]: row for row in evaluate(*on_series).rows}
    pairs = [(tmp_path / "p" / p, tmp_path / "r" / r) for p, r in zip(names, reversed(names), strict=True)]
    pairs += [(tmp_path / "p" / n, tmp_path / "r" / "a.nii.gz") for n in names]
    pairs.append((tmp_path / "masks", tmp_path / "r" / "a.nii.gz"))
    for prediction, reference in pairs:
        rows = evaluate_json(prediction, reference)["cases"]
        assert sorted(row["structure"] for row in rows) == ["liver", "spleen"], prediction
        is_rounded = "rtstruct" in f"{prediction}{reference}"  # contours are stored with decimals
        for row in rows:
            for key in ("dice", "hd95_mm", "nsd", "volume_mm3"):
                gap = 0.02 if is_rounded else 1e-6
                assert row[key] == pytest.approx(want[row["structure"]][key], rel=gap, abs=gap), (prediction, key)


@pytest.mark.parametrize("above", [False, True])
def test_names_of_the_data_set(folders, above):
    """Label files without names are called as dataset.json says; names of a file come first."""
    for n in range(5):
        bare = LabelMap(truth(n).array, GRID)
        medseg.write(bare, folders / "r" / f"case_{n}.nii.gz", force=True)
        medseg.write(bare, folders / "p" / f"case_{n}.nii.gz", force=True)
    (folders / ("dataset.json" if above else "r/dataset.json")).write_text(
        '{"labels": {"0": "air", "1": "a", "4": "b"}}'
    )
    found = evaluate_json(folders / "p", folders / "r", "--lesions")
    assert [e["structure"] for e in found["summary"]] == ["a", "b", "mean"]
    one = evaluate(folders / "p" / "case_1.nii.gz", folders / "r" / "case_1.nii.gz", lesions=True)
    assert {row["structure"] for row in one.lesions} == {"a", "b"}
    assert [e["structure"] for e in evaluate_json(folders / "q", folders / "r")["summary"]] == [
        "liver",
        "spleen",
        "mean",
    ]


def test_folders_of_masks_are_cases(folders):
    for n in range(5):
        medseg.convert(folders / "p" / f"case_{n}.nii.gz", f"{folders}/m/case_{n}/", labels=True, split=True)
    masks, maps = (evaluate(folders / side, folders / "r") for side in "mp")
    assert [row["dice"] for row in masks.rows] == [row["dice"] for row in maps.rows]


def test_an_image_is_no_prediction(folders):
    medseg.write(Volume(np.full((1, *GRID.shape), 3.7, np.float32), GRID), folders / "image.nii.gz")
    assert (
        "must be integers"
        in medseg_command("evaluate", folders / "image.nii.gz", folders / "r" / "case_0.nii.gz", code=1)[1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables, several runs


def test_rows_as_files(folders, monkeypatch):
    want = evaluate(folders / "p", folders / "r").to_pandas()
    for name, load in (("rows.csv", pandas.read_csv), ("rows.parquet", pandas.read_parquet)):
        pytest.importorskip("pyarrow")
        medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / name)
        pandas.testing.assert_frame_equal(load(folders / name)[want.columns], want, check_dtype=False)
        assert (
            "must not exist yet"
            in medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / name, code=1)[1]
        )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / "x.parquet", code=1)[1]
    assert "pip install pyarrow" in error
    assert not (folders / "x.parquet").exists()
    assert (
        ".csv or .parquet"
        in medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / "x.txt", code=1)[1]
    )


def test_runs_are_compared_and_ranked(folders):
    found = evaluate_json(folders / "q", folders / "r", "--compare", folders / "p", folders / "r")
    assert [r["run"] for r in found["ranking"]] == [str(folders / "r"), str(folders / "p"), "this"]
    assert [r["place"] for r in found["ranking"]] == [1, 2, 3]
    assert [(c["run"], c["metric"], c["structure"]) for c in found["comparison"]] == [
        (str(folders / run), metric, structure)
        for run in "pr" for metric in ("dice", "nsd", "hd95_mm") for structure in ("liver", "spleen")
    ]  # fmt: skip
    assert all((c["difference"] < 0) == (c["metric"] != "hd95_mm") for c in found["comparison"])
    text, _ = medseg_command(
        "evaluate", folders / "q", folders / "r", "--compare", folders / "p", "--out", folders / "out"
    )
    assert "mean rank by Dice" in text
    assert "Ranks by Dice" in (folders / "out" / "report.html").read_text()


def test_labels_present_by_command(folders):
    """Where nobody drew the spleen, it is not scored with the option, and a false positive without."""
    only_liver = replace(truth(0), array=np.where(truth(0).array == 4, 0, truth(0).array))
    medseg.write(only_liver, folders / "r" / "case_0.nii.gz", force=True)
    plain = evaluate_json(folders / "p", folders / "r")["cases"]
    present = evaluate_json(folders / "p", folders / "r", "--labels-present")
    assert [row["dice"] for row in plain if (row["case"], row["structure"]) == ("case_0", "spleen")] == [0]
    assert [row["structure"] for row in present["cases"] if row["case"] == "case_0"] == ["liver"]
    assert [(e["structure"], e["n"], e["n_defined"]) for e in present["summary"]] == [
        ("liver", 5, 5), ("spleen", 4, 4), ("mean", 5, 5)
    ]  # fmt: skip
    drawn = evaluate(folders / "p", folders / "r", labels_present={"case_0": [1]})
    assert [row["structure"] for row in drawn.rows if row["case"] == "case_0"] == ["liver"]
    assert sum(row["structure"] == "spleen" for row in drawn.rows) == 4


def test_definition_and_missing_are_choices(folders):
    pair = folders / "p" / "case_2.nii.gz", folders / "r" / "case_2.nii.gz"
    values = {d: evaluate_json(*pair, "--definition", d)["cases"][0]["hd95_mm"] for d in ("voxel", "pooled", "area")}
    assert len(set(values.values())) == 3
    assert evaluate_json(*pair)["cases"][0]["hd95_mm"] == values[surface.DEFAULT_DEFINITION]
    medseg.write(replace(truth(2), array=truth(2).array * 0), pair[0], force=True)
    assert evaluate_json(*pair, "--missing", "nan")["cases"][0]["hd95_mm"] is None
    assert evaluate_json(*pair)["cases"][0]["hd95_mm"] == pytest.approx(np.linalg.norm((24 * 0.9, 19 * 1.3, 9 * 3.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Many cases, and predictions


def test_memory_does_not_grow_with_the_cohort(tmp_path, monkeypatch):
    """Label maps are let go of when their case is done: 6 times the cases need the memory of a few label maps."""
    grid = Geometry.from_parts((60, 50, 40), (0.9, 1.3, 3.0))
    array = np.zeros(grid.shape, np.uint8)
    array[20:40, 10:40, 10:30] = 1
    medseg.write(LabelMap(array, grid, STRUCTURES[:1]), tmp_path / "p.nii.gz")

    def peak(cases: int) -> int:
        paths: dict[str, Any] = {str(n): tmp_path / "p.nii.gz" for n in range(cases)}
        tracemalloc.start()
        evaluate(paths, paths, surface=False).summary  # noqa: B018
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)
    few, many = peak(10), peak(60)
    assert many - few < 50 * 30_000  # rows, and resamples of the bootstrap; each case holds 120,000 bytes twice


class Net(torch.nn.Module):
    """Logits that follow the intensity: bright is structure 2, dark is structure 5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), 4 * (x - 1.5), 4 * (-x - 1.5)], 1)


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Prediction of three images (one damaged), of which two have references; a further reference has no image."""
    predictor = medseg.Predictor(tiny.plan(), Net(), torch.device("cpu"))
    monkeypatch.setattr(medseg.Predictor, "load", lambda *_, **__: predictor)
    for n in range(4):
        image, labels = tiny.case(n)
        if n < 3:
            medseg.write(image, tmp_path / "in" / f"c{n}.nii.gz")
        if n != 1:
            medseg.write(labels, tmp_path / "r" / f"c{n}.nii.gz")
    return lambda *options, code: medseg_command("predict", "run", *options, "--device", "cpu", code=code)


@pytest.mark.parametrize("split", [False, True])
def test_predict_and_evaluate(tmp_path, predict, split):
    out = tmp_path / "out"
    options = [*(["--split"] if split else []), "--probabilities"]
    text, error = predict(tmp_path / "in", "--out", out, "--evaluate", tmp_path / "r", *options, code=1)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {row["case"] for row in metrics["cases"]} == {"c0", "c1", "c2"}  # c3 was not asked for
    assert [row["error"] for row in metrics["cases"] if row["case"] == "c1"] == [
        "reference must exist for every case, got none"
    ]
    assert "c1: reference must exist" in error
    scored = [row for row in metrics["cases"] if row["case"] == "c0"]
    assert [row["structure"] for row in scored] == ["bright", "dark"]
    assert all(row["dice"] > 0.6 for row in scored)
    assert "bright" in text
    assert "<img" in (out / "report.html").read_text()
    assert 0 < scored[0]["soft_dice"] < 1


def test_predict_and_evaluate_as_json(tmp_path, predict):
    files = predict(tmp_path / "in" / "c0.nii.gz", "--out", tmp_path / "a", "--json", code=0)[0]
    assert json.loads(files) == {"written": {"c0": [str(tmp_path / "a" / "c0.nii.gz")]}, "failed": {}}
    options = ["--out", tmp_path / "b", "--evaluate", tmp_path / "r", "--to", "nrrd,nifti", "--json"]
    found = json.loads(predict(tmp_path / "in", *options, code=1)[0])
    assert sorted(found["written"]) == ["c0", "c1", "c2"]
    assert found["summary"] == json.loads((tmp_path / "b" / "metrics.json").read_text())["summary"]


def test_predict_and_evaluate_one(tmp_path, predict):
    reference, out = tmp_path / "r" / "c2.nii.gz", tmp_path / "one"
    predict(tmp_path / "in" / "c2.nii.gz", "--out", out, "--evaluate", reference, code=0)
    assert json.loads((out / "metrics.json").read_text())["summary"][-1]["n_defined"] == 1
    message = predict(tmp_path / "in", "--out", tmp_path / "two", "--evaluate", reference, code=1)[1]
    assert "reference must be a folder for several predictions" in message
    message = predict(tmp_path / "in", "--out", tmp_path / "two", "--evaluate", tmp_path / "typo", code=1)[1]
    assert f"reference must exist, got {tmp_path / 'typo'}" in message
    medseg.write(tiny.case(0)[1], tmp_path / "others" / "x.nii.gz")
    message = predict(tmp_path / "in", "--out", tmp_path / "two", "--evaluate", tmp_path / "others", code=1)[1]
    assert "references must share case ids with what is predicted" in message
    assert not (tmp_path / "two").exists()  # refused before anything is predicted


def test_two_folders_of_masks_are_one_case(tmp_path: Path) -> None:
    """A mask that the prediction lacks is a missed structure, not a case that failed."""
    grid = Geometry.from_parts((9, 8, 5), (1.0, 1.3, 2.5))
    masks = np.zeros((2, 9, 8, 5), bool)
    masks[0, :3], masks[1, 5:] = True, True
    for name, kept in (("p", (0,)), ("r", (0, 1))):
        for n in kept:
            one = LabelMap(masks[n].astype(np.uint8), grid)
            write(one, tmp_path / name / f"{n + 1}_{('liver', 'spleen')[n]}.nii.gz")
    found = evaluate(tmp_path / "p", tmp_path / "r", surface=False)
    assert {r["case"] for r in found.rows} == {"r"}
    assert found.mean("dice") == 0.5
    assert not found.failed


def test_what_could_not_be_predicted_says_why(tmp_path: Path) -> None:
    grid = Geometry.from_parts((9, 8, 5), (1.0, 1.3, 2.5))
    array = np.zeros((9, 8, 5), np.uint8)
    array[:3] = 1
    for name in ("a", "b"):
        write(LabelMap(array, grid), tmp_path / "r" / f"{name}.nii.gz")
    write(LabelMap(array, grid), tmp_path / "p" / "a.nii.gz")
    found = evaluate_predictions(
        tmp_path / "p", {"a": [tmp_path / "p" / "a.nii.gz"]}, tmp_path / "r", failed={"b": "voxels must be finite"},
        image=lambda case: tmp_path / "no such scan.nii.gz",
    )  # fmt: skip
    assert [r["error"] for r in found.failed] == ["voxels must be finite"]
    assert (tmp_path / "p" / "report.html").is_file()  # a scan that is missing costs its picture alone
