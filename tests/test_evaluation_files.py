"""Evaluation as a user runs it: files and folders of every kind, through the command."""

from __future__ import annotations

import csv
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import tiny
import torch
from conftest import rotation
from scipy import ndimage
from sklearn.metrics import brier_score_loss

import medseg
from medseg import cli, surface
from medseg.evaluation import Lesions, evaluate
from medseg.io import write
from medseg.io.dicom_write import write_series
from medseg.report_evaluation import evaluate_predictions
from medseg.volume import Geometry, LabelMap, Structure, Volume

GRID = Geometry.from_parts((24, 19, 9), (0.9, 1.3, 3.0), (-20, 30, 5), rotation((0.2, -0.3, 0.1)))
STRUCTURES = (Structure(1, "liver"), Structure(4, "spleen"))


def truth(seed: int) -> LabelMap:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(GRID.shape), 2)
    return LabelMap(np.select([field > 0.06, field < -0.07], [1, 4], 0).astype(np.uint8), GRID, STRUCTURES)


def moved(labels: LabelMap, by: int) -> LabelMap:
    return replace(labels, array=np.roll(labels.array, by, 0))


def medseg_command(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):  # fmt: skip
        patch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        cli.main()
    assert int(stop.value.code or 0) == code, err.getvalue() + out.getvalue()
    return out.getvalue(), err.getvalue()


def evaluate_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(medseg_command("evaluate", *arguments, "--json", code=code)[0])
    return found


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """References r, and predictions p and q of which p are nearer."""
    for n in range(5):
        medseg.write(truth(n), tmp_path / "r" / f"case_{n}.nii.gz")
        medseg.write(moved(truth(n), n % 3), tmp_path / "p" / f"case_{n}.nii.gz")
        medseg.write(moved(truth(n), n % 3 + 2), tmp_path / "q" / f"case_{n}.nii.gz")
    return tmp_path


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


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


def test_probabilities_from_files(folders):
    """Beside the label map or in its place, as predict writes them; against scikit-learn's Brier score."""
    rng, soft = np.random.default_rng(0), folders / "soft"
    for n in range(5):
        logits = np.stack([moved(truth(n), 1).array == k for k in (0, 1, 4)]) * 3 + rng.normal(0, 1, (3, *GRID.shape))
        shares = np.exp(logits) / np.exp(logits).sum(0)
        volume = Volume(shares.astype(np.float32), GRID, {"structures": STRUCTURES})
        for folder in (folders / "p", soft):
            medseg.write(volume, folder / f"case_{n}_probabilities.nii.gz")
    beside = evaluate_json(folders / "p", folders / "r")
    alone = evaluate_json(soft, folders / "r")
    assert {row["case"] for row in alone["cases"]} == {f"case_{n}" for n in range(5)}
    for a, b in zip(beside["cases"], alone["cases"], strict=True):
        assert [a[k] for k in ("soft_dice", "brier", "ece")] == [b[k] for k in ("soft_dice", "brier", "ece")]
    hard = np.array([0, 1, 4])[shares.argmax(0)]
    for row, channel in zip(alone["cases"][-2:], (1, 2), strict=True):
        true = (truth(4).array == row["label"]).ravel()
        p = shares[channel].astype(np.float32).ravel().astype(float)
        assert row["brier"] == pytest.approx(brier_score_loss(true, p), abs=1e-6)
        assert row["soft_dice"] == pytest.approx(2 * (p * true).sum() / ((p**2).sum() + true.sum()), abs=1e-5)
        a, b = hard == row["label"], truth(4).array == row["label"]
        assert row["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert "soft_dice" not in evaluate(folders / "q", folders / "r").metrics
    one = evaluate_json(soft / "case_4_probabilities.nii.gz", folders / "r" / "case_4.nii.gz")
    assert one["cases"][0]["brier"] == alone["cases"][-2]["brier"]


def test_an_image_is_no_prediction(folders):
    medseg.write(Volume(np.full((1, *GRID.shape), 3.7, np.float32), GRID), folders / "image.nii.gz")
    assert (
        "must be integers"
        in medseg_command("evaluate", folders / "image.nii.gz", folders / "r" / "case_0.nii.gz", code=1)[1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Lesions and instances


def test_instances_by_command(tmp_path):
    """PQ, F1 and AP of instance maps by hand: IoUs 1, 2/3 and 1/3, one missed, one made up."""
    p, r = np.zeros((2, 40, 12, 1), np.uint16)
    r[0:4, 0:3], p[0:4, 0:3] = 300, 7
    r[10:14, 0:3], p[10:15, 0:3], p[10, 0:3] = 2, 9, 0  # 9 of 15 voxels: 0.6
    r[20:24, 0:3], p[22:26, 0:3] = 3, 11  # 6 of 18
    r[30:33, 0:3], p[30:33, 6:9] = 4, 13
    grid = Geometry.from_parts(p.shape, (1.0, 2.0, 1.0))
    for name, array in (("p", p), ("r", r)):
        medseg.write(LabelMap(array, grid), tmp_path / f"{name}.nii.gz")
    (row,) = evaluate_json(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz", "--instances")["cases"]
    assert row["structure"] == "instances"
    assert (row["lesions"], row["reference_lesions"], row["lesions_found"]) == (4, 4, 2)
    assert row["lesion_f1"] == row["rq"] == pytest.approx(2 / 4)
    assert row["sq"] == pytest.approx((1 + 9 / 15) / 2)
    assert row["pq"] == pytest.approx(0.8 * 0.5)
    assert (row["ap50"], row["ap75"]) == pytest.approx((2 / 6, 1 / 7))
    assert row["ap"] == pytest.approx((3 * 2 / 6 + 7 * 1 / 7) / 10)  # 0.5, 0.55, 0.6; then 1 alone
    assert row["dice"] == pytest.approx(2 * (12 + 9 + 6) / (np.sum(p > 0) + np.sum(r > 0)))
    loose = evaluate_json(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz", "--instances", "--min-iou", 0.3)["cases"][0]
    assert loose["lesions_found"] == 3
    layers = LabelMap(np.zeros((2, *p.shape), bool), grid)
    with pytest.raises(ValueError, match="instances must be numbers in one label map, got 2 layers"):
        evaluate(layers, layers, lesions=Lesions(instances=True))


@pytest.mark.data
def test_instances_of_real_nuclei(data_dir):
    """Against counting pair by pair, on a real instance map and a worse copy of it."""
    r = medseg.read_labels(sorted((data_dir / "dsb2018" / "labels").glob("*.png"))[2])
    shifted = np.roll(r.array, 3, 0)
    p = replace(r, array=np.where(shifted % 5 == 1, 0, shifted))
    (row,) = evaluate(p, r, lesions=Lesions(instances=True), surface=False).rows
    numbers = [[int(n) for n in np.unique(side.array) if n] for side in (p, r)]
    ious = np.array([
        [np.sum((p.array == a) & (r.array == b)) / np.sum((p.array == a) | (r.array == b)) for a in numbers[0]]
        for b in numbers[1]
    ])  # fmt: skip
    for column, least in (("ap50", 0.5), ("ap75", 0.75)):
        tp = np.sum(ious > least)  # above a half every match is the only one
        assert row[column] == pytest.approx(tp / (len(numbers[0]) + len(numbers[1]) - tp))


def test_lesions_are_named(tmp_path):
    """lesions.csv says where each lesion is, and which were merged, split, missed and made up."""
    p, r = np.zeros((2, *GRID.shape), np.uint8)
    r[1:4, 1:4, 1:3], r[6:9, 1:4, 1:3], p[1:9, 1:4, 1:3] = 1, 1, 1  # merged
    r[12:20, 1:4, 4:6], p[12:15, 1:4, 4:6], p[17:20, 1:4, 4:6] = 1, 1, 1  # split
    r[21:23, 10:12, 7:9], p[3:5, 14:16, 7:9] = 1, 1  # missed, and made up
    for name, array in (("p", p), ("r", r)):
        medseg.write(LabelMap(array, GRID, STRUCTURES[:1]), tmp_path / f"{name}.nii.gz")
    arguments = ("evaluate", tmp_path / "p.nii.gz", tmp_path / "r.nii.gz", "--lesions", "--matching", "overlap")
    medseg_command(*arguments, "--out", tmp_path / "out")
    with (tmp_path / "out" / "lesions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    notes = {(row["side"], row["lesion"]): row["note"] for row in rows if row["note"]}
    merged = next(n for (side, _), n in notes.items() if side == "prediction" and n.startswith("merges"))
    assert merged == "merges reference 1, 2"
    assert [n for (side, _), n in notes.items() if side == "reference" and n.startswith("is split")] == [
        "is split into prediction 3, 4"  # in the order in which they are met
    ]
    (missed,) = [row for row in rows if row["outcome"] == "missed"]
    centre = GRID.to_world((21.5, 10.5, 7.5))
    assert [float(missed[k]) for k in ("x_mm", "y_mm", "z_mm")] == pytest.approx(centre.tolist())
    assert float(missed["volume_mm3"]) == pytest.approx(8 * GRID.voxel_mm3)
    (false,) = [row for row in rows if row["outcome"] == "false positive"]
    assert [float(false[k]) for k in ("x_mm", "y_mm", "z_mm")] == pytest.approx(
        GRID.to_world((3.5, 14.5, 7.5)).tolist()
    )
    sizes = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"][0]
    # 63 and 63 mm3 merged and 168 mm3 split are found, 28 mm3 are missed
    assert (sizes["sensitivity_10_to_100_mm3"], sizes["sensitivity_100_to_1000_mm3"]) == pytest.approx((2 / 3, 1))
    assert sizes["sensitivity_from_1000_mm3"] is None
    assert "lesions" in (tmp_path / "out" / "report.html").read_text().lower()


def test_connectivity_is_a_choice(tmp_path):
    r = np.zeros(GRID.shape, np.uint8)
    r[2:4, 2:4, 2], r[4:6, 4:6, 2] = 1, 1  # touch by an edge
    medseg.write(LabelMap(r, GRID), tmp_path / "r.nii.gz")
    path = tmp_path / "r.nii.gz"
    counts = [
        evaluate_json(path, path, "--lesions", "--connectivity", c)["cases"][0]["reference_lesions"]
        for c in (26, 18, 6)
    ]
    assert counts == [1, 1, 2]


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
    assert [(c["run"], c["structure"]) for c in found["comparison"]] == [
        (str(folders / run), structure) for run in "pr" for structure in ("liver", "spleen")
    ]
    assert all(c["difference"] < 0 for c in found["comparison"])
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
    assert ("soft_dice" in scored[0]) != split


def test_predict_and_evaluate_one(tmp_path, predict):
    reference, out = tmp_path / "r" / "c2.nii.gz", tmp_path / "one"
    predict(tmp_path / "in" / "c2.nii.gz", "--out", out, "--evaluate", reference, code=0)
    assert json.loads((out / "metrics.json").read_text())["summary"][-1]["n_defined"] == 1
    message = predict(tmp_path / "in", "--out", tmp_path / "two", "--evaluate", reference, code=1)[1]
    assert "reference must be a folder for several predictions" in message


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
