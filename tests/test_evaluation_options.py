"""What is scored and what is written: structures by name, formats in order, other runs, options that do not fit."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from evaluated import GRID, evaluate_json, medseg_command, moved, truth, write_folders

import medseg
from medseg import case_files
from medseg.evaluation import Lesions, Surface, evaluate
from medseg.io.dicom_write import write_series
from medseg.scores import Evaluation
from medseg.statistics import compare_runs
from medseg.volume import Geometry, LabelMap, Volume

DECLARED = '{"labels": {"background": 0, "liver": 1, "spleen": 4, "aorta": 7}}'


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_folders(tmp_path)


def bare(folders: Path) -> None:
    """Label files without names."""
    for side in "pr":
        for path in (folders / side).iterdir():
            medseg.write(LabelMap(medseg.read_labels(path).array, GRID), path, force=True)


# ---------------------------------------------------------------------------------------------------------------------
# Structures


@pytest.mark.parametrize("where", ["p", "r", "."])
def test_structures_by_the_names_of_the_data_set(folders, where):
    bare(folders)
    (folders / where / "dataset.json").write_text(DECLARED)
    found = evaluate(folders / "p", folders / "r", structures=["spleen", "aorta"], surface=False)
    assert [(e["structure"], e["n_defined"]) for e in found.summary[:2]] == [("spleen", 5), ("aorta", 0)]
    assert {row["label"] for row in found.rows} == {4, 7}
    with pytest.raises(
        ValueError, match=r"structures must be among \['aorta', 'label 1', 'label 4', 'liver', 'spleen'\]"
    ):
        evaluate(folders / "p" / "case_0.nii.gz", folders / "r" / "case_0.nii.gz", structures=["heart"])


@pytest.mark.parametrize(
    ("option", "names", "numbers"),
    [
        ("{}", ["liver", "spleen", "aorta"], [1, 4, 7]),
        ("1=Leber, 4=Milz", ["Leber", "Milz"], [1, 4]),
        ("4", ["label 4"], [4]),
        ("label 1,4", ["label 1", "label 4"], [1, 4]),
    ],
)
def test_structures_by_command(folders, option, names, numbers):
    bare(folders)
    (folders / "x").mkdir()
    path = folders / "x" / "dataset.json"
    path.write_text(DECLARED)
    found = evaluate_json(folders / "p", folders / "r", "--structures", option.format(path))
    assert [e["structure"] for e in found["summary"][:-1]] == names
    assert [row["label"] for row in found["cases"] if row["case"] == "case_2"] == numbers
    one = evaluate_json(
        folders / "p" / "case_1.nii.gz", folders / "r" / "case_1.nii.gz", "--structures", option.format(path)
    )
    assert [row["structure"] for row in one["cases"]] == names


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("1=a,spleen", "structures must be a dataset.json, 1=NAME,2=NAME or NAME,2, got '1=a,spleen'"),
        ("", "structures must be a dataset.json"),
        ("nowhere/dataset.json", "structures must be declared by a dataset.json, got nowhere/dataset.json"),
        ("0=air", "structures must be names, or numbers of at least 1"),
    ],
)
def test_structures_that_are_none(folders, option, message):
    assert message in medseg_command("evaluate", folders / "p", folders / "r", "--structures", option, code=1)[1]


def test_a_dataset_json_without_labels(folders):
    (folders / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="labels must be declared like"):
        evaluate(folders / "p", folders / "r", structures=folders / "dataset.json")


# ---------------------------------------------------------------------------------------------------------------------
# Formats of one case


def test_one_format_of_a_case_is_read(tmp_path, caplog):
    """As medseg predict --to nifti,nrrd,seg,rtstruct writes them; here each is worse than the one before."""
    grid = Geometry.from_parts((24, 19, 9), (0.9, 1.3, 3.0), (-20, 30, 5), np.diag([-1.0, -1.0, 1.0]))
    write_series(Volume(np.zeros((1, *grid.shape), np.int16), grid), tmp_path / "series", modality="CT")
    reference = replace(truth(1), geometry=medseg.read(tmp_path / "series").geometry)
    medseg.write(reference, tmp_path / "r" / "a.nii.gz")
    names = ("a.nii.gz", "a.nrrd", "a.mha", "a.seg.dcm", "a.rtstruct.dcm")
    for n, name in enumerate(names):
        medseg.write(moved(reference, n), tmp_path / "p" / name, source=tmp_path / "series")
    means = []
    for name in names:
        with caplog.at_level("INFO", "medseg"):
            means.append(evaluate(tmp_path / "p", tmp_path / "r", surface=False).mean("dice"))
        (tmp_path / "p" / name).unlink()
    assert means[0] == 1
    assert all(a > b + 0.02 for a, b in pairwise(means))
    assert "and 3 more not read" in caplog.messages[0]
    assert len(caplog.messages) == 4  # nothing to say of a case in one format


def test_two_files_of_one_format_are_refused(folders):
    shutil.copy(folders / "p" / "case_1.nii.gz", folders / "p" / "case_1.nii")
    with pytest.raises(ValueError, match=r"case ids must be unique in a folder, got case_1\.nii and case_1\.nii\.gz"):
        evaluate(folders / "p", folders / "r")
    for suffix in (".nrrd", ".mha"):  # another format does not make up for it
        medseg.write(truth(1), folders / "p" / f"case_1{suffix}")
        with pytest.raises(ValueError, match="case ids must be unique"):
            evaluate(folders / "p", folders / "r")


def test_the_folder_one_is_in_has_a_name(folders, monkeypatch):
    medseg.convert(folders / "p" / "case_1.nii.gz", f"{folders}/m/case_1/", labels=True, split=True)
    monkeypatch.chdir(folders / "m" / "case_1")
    found = evaluate(".", folders / "r" / "case_1.nii.gz", surface=False)
    assert {row["case"] for row in found.rows} == {"case_1"}
    assert case_files.case_id(".") == "case_1"


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


def test_comparisons_are_in_the_files(folders):
    out = folders / "out"
    medseg_command("evaluate", folders / "p", folders / "r", "--compare", folders / "q", "--out", out)
    data = json.loads((out / "metrics.json").read_text())
    this, other = (evaluate(folders / side, folders / "r") for side in "pq")
    for row in data["comparison"]:
        values = [
            [r[row["metric"]] for r in e.rows if r["structure"] == row["structure"]] for e in (other, this)
        ]  # fmt: skip
        assert row["run"] == str(folders / "q")
        assert row["difference"] == pytest.approx(np.mean(values[1]) - np.mean(values[0]))
        assert row["low"] <= row["difference"] <= row["high"] and row["p"] <= row["p_holm"] <= 1
    assert [(row["run"], row["place"]) for row in data["ranking"]] == [("this", 1), (str(folders / "q"), 2)]
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], float(row["difference"])) for row in rows] == [
        (row["metric"], pytest.approx(row["difference"])) for row in data["comparison"]
    ]
    assert data["comparison"] == evaluate_json(folders / "p", folders / "r", "--compare", folders / "q")["comparison"]


def test_runs_with_nothing_in_common_are_said_to_have_none(folders):
    (folders / "z").mkdir()
    shutil.copy(folders / "q" / "case_4.nii.gz", folders / "z" / "case_4.nii.gz")
    (folders / "p" / "case_4.nii.gz").unlink()
    text, error = medseg_command(
        "evaluate", folders / "p", folders / "r", "--compare", folders / "z", "--out", folders / "out", code=1
    )
    assert f"no comparison with {folders / 'z'} by dice: runs must share cases" in error
    assert "No comparison with" in (folders / "out" / "report.html").read_text()
    assert "mean rank by Dice" in text
    run = evaluate(folders / "q", folders / "r")
    assert compare_runs(run, {"other": run}).pairs["other"][0].difference == 0


# ---------------------------------------------------------------------------------------------------------------------
# Options, settings and files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-iou", 0.3), "matching, min-iou, connectivity and sizes-mm3 must go with --lesions or --instances"),
        (("--matching", "overlap"), "must go with --lesions or --instances"),
        (("--sizes-mm3", 5, 50), "must go with --lesions or --instances"),
        (("--lesions", "--sizes-mm3", 50, 5), "sizes_mm3 must be positive and rise, got (50.0, 5.0)"),
        (("--instances", "--connectivity", 6), "connectivity must go with --lesions"),
        (("--lesions", "--matching", "overlap", "--min-iou", 0.2), "min-iou must go with --matching iou or optimal"),
        (("--instances", "--structures", "1"), "structures and labels_present must not be given for instances"),
        (("--instances", "--labels-present"), "structures and labels_present must not be given for instances"),
        (("--image", "."), "image must go with a report"),
        (("--image", ".", "--out", "rows.csv"), "image must go with a report, got --out rows.csv"),
        (("--out", "table.xlsx"), "out must be a folder or end in .csv or .parquet"),
        (("--tolerance-mm", -1), "tolerance_mm must be 0 or more"),
        (("--compare", "{}"), "compare must name other predictions, each once"),
    ],
)
def test_options_without_effect_are_refused(folders, options, message, monkeypatch):
    monkeypatch.chdir(folders)
    arguments = [str(o).format(folders / "p") for o in options]
    assert message in medseg_command("evaluate", folders / "p", folders / "r", *arguments, code=1)[1]


def test_invalid_values_are_refused_at_once(folders):
    """Not case by case, where they would be reasons of failed cases."""
    for wrong in ({"definition": "mesh"}, {"missing": "zero"}):
        with pytest.raises(ValueError, match="must be one of"):
            Surface(**wrong)
    with pytest.raises(ValueError, match="tolerance_mm must be 0 or more"):
        evaluate(folders / "p", folders / "r", tolerance_mm=np.nan)
    with pytest.raises(ValueError, match="structures must be names, or numbers of at least 1, got"):
        evaluate(folders / "p", folders / "r", structures=[0])
    with pytest.raises(ValueError, match="must not be given for instances"):
        evaluate(folders / "p", folders / "r", structures=[1], lesions=Lesions(instances=True))


def test_a_folder_may_have_a_dot_in_its_name(folders):
    for name in ("v1.2", "run.final"):
        medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / name)
        assert (folders / name / "report.html").is_file()
    (folders / "x.csv").mkdir()
    medseg_command("evaluate", folders / "p", folders / "r", "--out", folders / "x.csv")
    assert (folders / "x.csv" / "metrics.json").is_file()


def test_settings_are_complete(folders):
    found = evaluate(
        folders / "p", folders / "r", structures={np.int64(1): "liver"}, tolerance_mm=2.5, lesions=True,
        labels_present={"case_1": [np.int64(1)]}, resample=True, common_only=True, surface=Surface("area", "nan"),
    )  # fmt: skip
    settings = json.loads(found.to_json())["settings"]
    assert settings.pop("lesions")["min_iou"] == 0.5
    assert settings == {
        "surface": "area", "missing": "nan", "tolerance_mm": 2.5, "structures": {"1": "liver"}, "resample": True,
        "labels_present": {"case_1": [1]}, "common_only": True,
    }  # fmt: skip
    none = evaluate(folders / "p", folders / "r", surface=False, structures=(np.int64(4), "liver"))
    assert json.loads(none.to_json())["settings"]["surface"] is None
    assert [row["label"] for row in json.loads(none.to_json())["cases"][:2]] == [1, 4]
    assert Evaluation.from_json(found.to_json()).rows[0]["label"] == 1


def test_metrics_json_appears_last(folders, monkeypatch):
    """Where it is, the tables are complete; where one cannot be written, nothing of the former is lost."""
    found = evaluate(folders / "p", folders / "r", lesions=True, surface=False)
    found.write(folders / "out")
    before = {p.name: p.read_bytes() for p in (folders / "out").iterdir()}
    order: list[str] = []
    replaced = medseg.io.files.os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medseg.io.files.os, "replace", lambda a, b: (order.append(Path(b).name), replaced(a, b)))
        found.write(folders / "out", force=True)
    assert sorted(order) == ["lesions.csv", "metrics.csv", "metrics.json"]
    assert order[-1] == "metrics.json"

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(medseg.scores.csv, "DictWriter", full)
    with pytest.raises(OSError, match="no space left"):
        evaluate(folders / "q", folders / "r", surface=False).write(folders / "out", force=True)
    assert {p.name: p.read_bytes() for p in (folders / "out").iterdir()} == before


def test_a_data_frame_needs_pandas(folders, monkeypatch):
    found = evaluate(folders / "p", folders / "r", surface=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="a DataFrame needs pandas, got none installed; pip install pandas"):
        found.to_pandas()
