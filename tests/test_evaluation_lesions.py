"""Evaluation of lesions and instances through files: rows, lesions.csv, and the cohort as one."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluated import GRID, STRUCTURES, evaluate_json, medseg_command
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import medseg
from medseg.cohort import pooled
from medseg.evaluation import Lesions, evaluate
from medseg.lesions import detection, match_lesions, sensitivity_by_size
from medseg.scores import Evaluation
from medseg.volume import Geometry, LabelMap, Structure


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
# The cohort as one


def spots(seed: int, level: float) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((14, 11, 8)), 1)
    return field > level * field.std()


@settings(max_examples=25)
@given(st.integers(0, 5000), st.sampled_from(["iou", "optimal", "overlap"]), st.integers(1, 4))
def test_the_cohort_is_scored_as_one(seed, rule, cases):
    """Sums over rows equal the metrics of all matches together, cases without lesions among them."""
    how = Lesions(rule, 0.2, sizes_mm3=(4.0, 30.0))
    grid = Geometry.from_parts((14, 11, 8), (0.7, 1.3, 1.0))
    predictions, references, matches = {}, {}, []
    for n in range(cases):
        p, r = spots(seed + n, 1.5), spots(seed + n, 1.9) & (n != 1)
        matches.append(match_lesions(p, r, grid.spacing, how))
        structure = (Structure(1, "lesion"),)
        predictions[f"{n}"], references[f"{n}"] = (LabelMap(m.astype(np.uint8), grid, structure) for m in (p, r))
    found = evaluate(predictions, references, lesions=how, surface=False)
    (entry,) = found.pooled
    want = detection(matches)
    for key, value in want.items():
        if key in ("ap",):  # cannot be had from the rows
            continue
        got = entry[key]["value"] if isinstance(entry[key], dict) else entry[key]
        assert got == pytest.approx(value, nan_ok=True), key
    sizes = sensitivity_by_size(matches)
    for row, name in zip(sizes, ("to_4_mm3", "4_to_30_mm3", "from_30_mm3"), strict=True):
        assert entry[f"reference_lesions_{name}"] == row["reference_lesions"]
        assert entry[f"sensitivity_{name}"]["value"] == pytest.approx(row["lesion_sensitivity"], nan_ok=True)
    again = Evaluation.from_json(found.to_json())
    assert json.loads(again.to_json())["pooled"] == json.loads(found.to_json())["pooled"]


def test_pooled_without_any_pair():
    """Pairs that are many to many have no panoptic quality, whether there are some or none."""
    array = np.zeros((2, 9, 5, 4), np.uint8)
    array[0, 1:3, 1:3, 1:3], array[1, 5:7, 1:3, 1:3] = 1, 1
    p, r = (LabelMap(own, Geometry.from_parts((9, 5, 4), (0.7, 1.3, 2.0))) for own in array)
    for rule in ("overlap", "iou", "optimal"):
        (entry,) = evaluate(p, r, lesions=Lesions(rule), surface=False).pooled
        want = detection([match_lesions(array[0] > 0, array[1] > 0, (1, 1, 1), Lesions(rule))])
        got = [entry[key]["value"] for key in ("lesion_f1", "sq", "rq", "pq")]
        assert got == pytest.approx([want[key] for key in ("lesion_f1", "sq", "rq", "pq")], nan_ok=True)


def test_pooled_is_not_the_mean_per_case():
    """One lesion of one found in a case, none of nine in another: 0.5 per case, 0.1 of all lesions."""
    grid = Geometry.from_parts((40, 5, 4), (1.0, 1.2, 2.5))
    one, nine = np.zeros((2, *grid.shape), np.uint8)
    one[3:6, 1:3, 1:3] = 1
    for n in range(9):
        nine[4 * n : 4 * n + 2, 1:3, 1:3] = 1
    maps = [LabelMap(a, grid, (Structure(1, "lesion"), Structure(2, "edema"))) for a in (one, nine, nine * 0)]
    found = evaluate({"a": maps[0], "b": maps[2]}, {"a": maps[0], "b": maps[1]}, lesions=True, surface=False)
    assert found.mean("lesion_sensitivity", "lesion") == 0.5
    lesion, edema, together = found.pooled
    assert lesion["lesion_sensitivity"]["value"] == pytest.approx(0.1)
    assert lesion["lesion_f1"]["value"] == pytest.approx(2 / 11)
    assert (lesion["lesions_found"], lesion["lesions_missed"], edema["reference_lesions"]) == (1, 9, 0)
    assert np.isnan(edema["lesion_f1"]["value"])
    assert together["structure"] == "all" and together["pq"] == lesion["pq"]
    low, high = lesion["lesion_sensitivity"]["ci95"]
    assert low == 0 and high == 1  # either case alone
    assert pooled([{**row, "error": "no"} for row in found.rows]) == []


def test_lesions_of_skewed_grids_have_their_volume():
    affine = np.array(GRID.affine)
    affine[:3, 2] += 0.6 * affine[:3, 0]
    skewed = Geometry(GRID.shape, affine)
    array = np.zeros(GRID.shape, np.uint8)
    array[2:5, 3:6, 2:4] = 1
    labels = LabelMap(array, skewed, STRUCTURES[:1])
    found = evaluate(labels, labels, surface=False, lesions=True)
    want = 18 * abs(np.linalg.det(affine[:3, :3]))
    assert want != pytest.approx(18 * np.prod(skewed.spacing), rel=0.01)
    assert [row["volume_mm3"] for row in found.lesions] == pytest.approx([want] * 2)
    assert found.rows[0]["volume_mm3"] == pytest.approx(want)


def test_files_of_a_former_evaluation_do_not_stay(tmp_path):
    array = np.zeros(GRID.shape, np.uint8)
    array[2:5, 3:6, 2:4] = 1
    labels = LabelMap(array, GRID, STRUCTURES[:1])
    out = tmp_path / "out"
    evaluate(labels, labels, lesions=True).write(out, comparison={"comparison": [{"run": "x"}], "ranking": []})
    assert {p.name for p in out.iterdir()} == {"metrics.json", "metrics.csv", "lesions.csv", "comparison.csv"}
    (out / "metrics.json").unlink()
    with pytest.raises(FileExistsError):  # though it writes no lesions.csv
        (out / "metrics.csv").unlink()
        evaluate(labels, labels).write(out)
    evaluate(labels, labels).write(out, force=True)
    assert {p.name for p in out.iterdir()} == {"metrics.json", "metrics.csv"}
    empty = replace(labels, array=array * 0)
    evaluate(empty, empty, lesions=True).write(out, force=True)
    with (out / "lesions.csv").open() as file:  # asked for, and none there
        assert list(csv.DictReader(file)) == [] and file.seek(0) == 0 and "outcome" in file.readline()


def test_classes_of_size_are_a_choice(tmp_path):
    array = np.zeros(GRID.shape, np.uint8)
    array[2:4, 3:5, 2:4], array[8:15, 3:9, 2:7] = 1, 1  # 28 and 737 mm3
    medseg.write(LabelMap(array, GRID, STRUCTURES[:1]), tmp_path / "r.nii.gz")
    found = evaluate_json(tmp_path / "r.nii.gz", tmp_path / "r.nii.gz", "--lesions", "--sizes-mm3", 28, 29)
    sizes = ("to_28_mm3", "28_to_29_mm3", "from_29_mm3")
    assert [found["pooled"][0][f"reference_lesions_{size}"] for size in sizes] == [0, 1, 1]


def test_the_report_tells_of_lesions(tmp_path: Path):
    array = np.zeros(GRID.shape, np.uint8)
    array[2:4, 3:5, 2:4], array[8:15, 3:9, 2:7] = 1, 1
    labels = LabelMap(array, GRID, STRUCTURES[:1])
    missed = replace(labels, array=np.where(np.arange(24)[:, None, None] < 6, 0, array))
    for n in range(3):
        medseg.write(labels, tmp_path / "r" / f"{n}.nii.gz")
        medseg.write(missed if n else labels, tmp_path / "p" / f"{n}.nii.gz")
    text, _ = medseg_command("evaluate", tmp_path / "p", tmp_path / "r", "--lesions", "--out", tmp_path / "out")
    assert "all cases together" in text
    dice = 2 * missed.array.sum() / (missed.array.sum() + array.sum(dtype=int))
    assert f"worst by mean Dice: 1 {dice:.3f}, 2 {dice:.3f}, 0 1.000; median {dice:.3f} of 3" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Lesions of all cases together" in page and "Lesions by size" in page
    row = page[page.index("10 to 100</td>") :]
    row = row[: row.index("</tr>")]
    assert [part.split("<")[0] for part in row.split("<td")[1:3]] == [' class="number">3', ' class="number">1']
    data = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert data["pooled"][0]["sensitivity_10_to_100_mm3"]["value"] == pytest.approx(1 / 3)
