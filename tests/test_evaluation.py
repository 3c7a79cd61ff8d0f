"""Evaluation of label maps, files and folders."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import geometries, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg import evaluation, metrics
from medseg.evaluation import Surface, evaluate, score_case
from medseg.io import write
from medseg.volume import Geometry, GeometryError, LabelMap, Structure

GRID = Geometry.from_parts((14, 11, 8), (0.8, 1.1, 3.0), (-20, 30, 5), rotation((0.2, -0.3, 0.1)))


def label_map(seed: int, labels=(1, 2), names=("Anterior", "Posterior"), grid: Geometry = GRID) -> LabelMap:
    """Boxes at random places, the labels in order along i."""
    rng = np.random.default_rng(seed)
    array = np.zeros(grid.shape, np.uint8)
    for n, label in enumerate(labels):
        band = array[n * grid.shape[0] // 2 : (n + 1) * grid.shape[0] // 2]
        box = tuple(
            slice(int(rng.integers(0, (s + 1) // 2)), int(rng.integers((s + 1) // 2, s + 1))) for s in band.shape
        )
        band[box] = label
    return LabelMap(array, grid, tuple(Structure(n, s) for n, s in zip(labels, names, strict=True)))


@settings(max_examples=25, deadline=None)
@given(geometries(), st.integers(0, 999))
def test_rows_of_one_pair(grid, seed):
    p, r = label_map(seed, grid=grid), label_map(seed + 1, grid=grid)
    rows = evaluate(p, r, tolerance_mm=2.0).rows
    assert [row["structure"] for row in rows] == ["Anterior", "Posterior"]
    for row in rows:
        a, b = p.array == row["label"], r.array == row["label"]
        assert row["iou"] == pytest.approx((a & b).sum() / (a | b).sum())
        assert row["volume_mm3"] == pytest.approx(a.sum() * np.prod(grid.spacing))
        assert row["reference_volume_mm3"] == pytest.approx(b.sum() * abs(np.linalg.det(grid.affine[:3, :3])))
        scores = metrics.surface_scores(a, b, grid.spacing, tolerance_mm=2.0)
        assert (row["hd95_mm"], row["nsd"]) == pytest.approx((scores.hd95_mm, scores.nsd))


def test_surface_is_a_choice():
    p, r = label_map(1), label_map(2)
    assert all(np.isnan(row["hd95_mm"]) for row in evaluate(p, r, surface=False).rows)
    area = evaluate(p, r, surface=Surface("area")).rows[0]["hd95_mm"]
    want = metrics.surface_scores(p.array == 1, r.array == 1, GRID.spacing, definition="area").hd95_mm
    assert area == pytest.approx(want)


def test_missing_and_false_structures():
    p = label_map(1, (3, 2), ("label 3", "Posterior"))
    r = label_map(2, (1, 2), ("Anterior", "Posterior"))
    rows = evaluate(p, r).rows
    assert [(row["structure"], row["dice"] > 0) for row in rows] == [
        ("Anterior", False), ("Posterior", True), ("label 3", False)
    ]  # fmt: skip
    assert rows[0]["volume_mm3"] == 0 < rows[0]["reference_volume_mm3"]
    present = evaluate(p, r, labels_present=True).rows
    assert [row["structure"] for row in present] == ["Anterior", "Posterior"]
    assert np.isnan(evaluate(p, r, surface=Surface(missing="nan")).rows[0]["hd95_mm"])


@pytest.mark.parametrize("layered", [False, True])
def test_structures_that_nobody_drew_are_not_scored(layered):
    """Structure 3 was not drawn; structure 2 was looked for and is truly absent, so predicting it is a mistake."""
    both = label_map(1), label_map(2)
    arrays = both[0].array, np.where(both[1].array == 2, 0, both[1].array)
    structures = tuple(Structure(n, f"s{n}") for n in (1, 2, 3))
    if layered:
        layers = [np.stack([a == 1, a == 2, np.full(a.shape, n == 0)]) for n, a in enumerate(arrays)]
        p, r = (LabelMap(a, GRID, structures) for a in layers)
    else:
        p, r = (LabelMap(a, GRID, structures) for a in arrays)
    rows = score_case("x", p, r, known=[1, 2])
    assert [(row["structure"], row["dice"] > 0) for row in rows] == [("s1", True), ("s2", False)]
    assert rows == score_case("x", p, r)[:2]
    assert score_case("x", p, r, known=()) == []


def test_structures_can_be_chosen_and_named():
    p, r = label_map(1), label_map(2)
    assert [row["structure"] for row in evaluate(p, r, structures=["Posterior"]).rows] == ["Posterior"]
    assert [row["label"] for row in evaluate(p, r, structures=[2]).rows] == [2]
    named = evaluate(p, r, structures={1: "head", 9: "tail"})
    assert [row["structure"] for row in named.rows] == ["head", "tail"]
    assert [e["n_defined"] for e in named.summary] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"structures must be among \['Anterior', 'Posterior'\], got \['x'\]"):
        evaluate(p, r, structures=["x"])


@pytest.mark.parametrize("layered", [False, True])
def test_structures_of_other_numbers_match_by_name(layered):
    r = label_map(2)
    if layered:
        structures = (Structure(1, "Posterior"), Structure(2, "Anterior"))
        p = LabelMap(np.stack([r.array == 2, r.array == 1]), GRID, structures)
    else:
        swapped = np.array([0, 7, 3], np.uint8)[r.array]
        p = LabelMap(swapped, GRID, (Structure(3, "Posterior"), Structure(7, "Anterior")))
    assert [(row["structure"], row["label"], row["iou"]) for row in evaluate(p, r).rows] == [
        ("Anterior", 1, 1.0), ("Posterior", 2, 1.0)
    ]  # fmt: skip


def lines(labels: dict[int, str], **at: int) -> LabelMap:
    """One slab for each place, i = 1, 4, 7 ..., of the number given."""
    array = np.zeros(GRID.shape, np.uint8)
    for place, number in at.items():
        start = int(place[1:])
        array[start : start + 2, 2:7, 1:5] = number
    return LabelMap(array, GRID, tuple(Structure(n, s) for n, s in labels.items()))


@pytest.mark.parametrize("layered", [False, True])
def test_names_in_common_match_whatever_the_others_are(layered):
    r = lines({1: "liver", 2: "spleen", 255: "aorta"}, i1=1, i4=2, i10=255)
    p = lines({1: "spleen", 2: "liver", 3: "label 3", 255: "kidney"}, i1=2, i4=1, i7=3, i10=255)
    if layered:
        p, r = (LabelMap(np.stack([x.array == s.number for s in x.structures]), GRID, x.structures) for x in (p, r))
    result = {row["structure"]: (row["dice"], row["volume_mm3"] > 0) for row in evaluate(p, r).rows}
    assert result == {
        "liver": (1, True), "spleen": (1, True), "aorta": (0, False), "label 3": (0, True), "kidney": (0, True)
    }  # fmt: skip


def test_without_a_common_name_structures_match_by_number():
    r, p = lines({1: "liver", 2: "tumour"}, i1=1, i4=2), lines({1: "Leber", 2: "label 2"}, i1=1, i4=2)
    assert [(row["structure"], row["dice"]) for row in evaluate(p, r).rows] == [("liver", 1), ("tumour", 1)]


def test_two_structures_of_one_name_are_told_apart():
    names = {1: "node", 2: "node", 3: "node (2)"}
    r, p = lines(names, i1=1, i4=2, i7=3), lines(names, i1=1, i7=3)
    result = evaluate({"a": p, "b": r}, {"a": r, "b": r})
    assert [e["structure"] for e in result.summary] == ["node", "node (2)", "node (2) (3)", "mean"]
    assert [e["dice"]["mean"] for e in result.summary[:3]] == [1, 0.5, 1]
    unnamed = lines({1: "label 1", 2: "label 2"}, i1=1, i4=2)
    swapped = lines({2: "node"}, i4=2)
    named = lines({1: "node"}, i1=1)
    mixed = evaluate({"a": unnamed, "b": named, "c": swapped}, {"a": unnamed, "b": named, "c": swapped})
    keys = [(row["case"], row["structure"]) for row in mixed.rows]
    assert len(set(keys)) == len(keys)
    assert [row["structure"] for row in evaluate(p, r, structures={1: "x", 2: "x"}).rows] == ["x", "x (2)"]


def test_a_name_that_one_case_lacks_is_an_empty_row_there():
    """As in DICOM objects, which list but what they hold; a name that no case knows is refused."""
    full, part = lines({1: "liver", 2: "tumour"}, i1=1, i4=2), lines({1: "liver"}, i1=1)
    result = evaluate({"a": full, "b": part}, {"a": full, "b": part}, structures=["tumour"])
    assert [(row["case"], row["structure"], row["label"]) for row in result.rows] == [
        ("a", "tumour", 2), ("b", "tumour", 2)
    ]  # fmt: skip
    assert (result.summary[0]["n"], result.summary[0]["n_defined"]) == (2, 1)
    typo = evaluate({"a": full, "b": part}, {"a": full, "b": part}, structures=["liver", "tumuor"])
    reason = "structures must be among ['liver', 'tumour'], got ['tumuor']"
    assert [(row["case"], row["error"]) for row in typo.rows] == [("a", reason), ("b", reason)]
    for score in (evaluate, lambda p, r, **more: score_case("x", p, r, **more)):
        with pytest.raises(ValueError, match=r"structures must be among \['liver'\], got \['tumour'\]"):
            score(part, part, structures=["tumour"])


def test_overlapping_layers_and_probabilities():
    layers = np.zeros((2, *GRID.shape), bool)
    layers[0, 2:9], layers[1, 5:12] = True, True
    structures = (Structure(1, "a"), Structure(2, "b"))
    r = LabelMap(layers, GRID, structures)
    p = LabelMap(np.where(layers, 0.9, 0.2).astype(np.float32), GRID, structures)
    assert [row["dice"] for row in evaluate(p, r).rows] == [1, 1]


def test_grids_must_agree():
    shifted = Geometry.from_parts(
        GRID.shape, GRID.spacing, GRID.to_world((0, 0, 0)) + np.array((0, 0, 0.5)), GRID.direction
    )
    p, r = label_map(1), label_map(2, grid=shifted)
    with pytest.raises(GeometryError, match=r"prediction and reference of case must lie .* 0\.500 mm apart"):
        evaluate(p, r)
    with pytest.raises(GeometryError, match=r"shapes \(14, 11, 8\) and \(9, 5, 4\)"):
        evaluate(p, label_map(2, grid=Geometry.from_parts((9, 5, 4), (1, 2, 3))))
    (row, *_) = evaluate(p, r, resample=True).rows
    assert row["volume_mm3"] > 0


def test_skewed_grids_have_volumes_but_no_distances():
    affine = np.array(GRID.affine)
    affine[:3, 2] += 0.4 * affine[:3, 0]
    skewed = Geometry(GRID.shape, affine)
    p, r = label_map(1, grid=skewed), label_map(2, grid=skewed)
    with pytest.raises(GeometryError, match="axes at right angles"):
        evaluate(p, r)
    for row in evaluate(p, r, surface=False).rows:
        assert row["volume_mm3"] == pytest.approx(np.sum(p.array == row["label"]) * 0.8 * 1.1 * 3.0)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def folders(tmp_path):
    for n in range(5):
        write(label_map(n), tmp_path / "p" / f"case_{n}.nii.gz")
        write(label_map(n + 10), tmp_path / "r" / f"case_{n}.nii.gz")
    return tmp_path / "p", tmp_path / "r"


def test_folders_files_mappings_and_threads_agree(folders, monkeypatch):
    p, r = folders
    seen: list[tuple[int, int]] = []
    whole = evaluate(p, r, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(n, 5) for n in range(1, 6)]
    assert [row["case"] for row in whole.rows] == [f"case_{n}" for n in range(5) for _ in range(2)]
    single = evaluate(p / "case_3.nii.gz", str(r / "case_3.nii.gz"))
    assert single.rows == whole.rows[6:8]
    monkeypatch.setattr(evaluation, "MOST_WORKERS", 1)
    mapped = evaluate({f"case_{n}": label_map(n) for n in range(5)}, r)
    assert [row["iou"] for row in mapped.rows] == [row["iou"] for row in whole.rows]
    assert [row["iou"] for row in score_case("x", label_map(3), label_map(13))] == [row["iou"] for row in single.rows]


def test_a_case_that_fails_is_a_row(folders):
    p, r = folders
    (p / "case_1.nii.gz").write_bytes((p / "case_1.nii.gz").read_bytes()[:60])
    (p / "case_2.nii.gz").unlink()
    other = Geometry.from_parts(GRID.shape, GRID.spacing, (0, 0, 0))
    write(label_map(3, grid=other), p / "case_3.nii.gz", force=True)
    write(label_map(9), p / "extra.nii.gz")
    result = evaluate(p, r)
    reasons = {row["case"]: row["error"] for row in result.failed}
    assert sorted(reasons) == ["case_1", "case_2", "case_3", "extra"]
    assert reasons["case_2"] == "prediction must exist for every case, got none"
    assert reasons["extra"] == "reference must exist for every case, got none"
    assert "mm apart" in reasons["case_3"]
    assert {row["case"] for row in result.rows} - set(reasons) == {"case_0", "case_4"}
    assert result.summary[0]["n"] == result.summary[0]["n_defined"] == 2
    assert sorted(row["case"] for row in evaluate(p, r, common_only=True).failed) == ["case_1", "case_3"]


def test_a_structure_in_some_cases_only_is_counted(tmp_path):
    write(LabelMap(np.where(label_map(0).array == 1, 1, 0).astype(np.uint8), GRID), tmp_path / "p" / "a.nii.gz")
    write(LabelMap(np.where(label_map(0).array == 1, 1, 0).astype(np.uint8), GRID), tmp_path / "r" / "a.nii.gz")
    write(label_map(1), tmp_path / "p" / "b.nii.gz")
    write(label_map(2), tmp_path / "r" / "b.nii.gz")
    result = evaluate(tmp_path / "p", tmp_path / "r")
    assert [(e["n"], e["n_defined"]) for e in result.summary] == [(2, 2), (2, 1), (2, 2)]
    assert np.isnan([row["iou"] for row in result.rows if row["case"] == "a" and row["label"] == 2]).all()
    kept = evaluate(tmp_path / "p", tmp_path / "r", labels_present=True)
    assert [(e["n"], e["n_defined"]) for e in kept.summary] == [(2, 2), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
        (MemoryError(), "MemoryError"),
        (KeyError("x"), "KeyError: 'x'"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_what_nobody_expects_ends_one_case_only(monkeypatch, error, reason):
    score = evaluation.score

    def unlucky(case, *sides, **more):
        if case == "case_1":
            raise error
        return score(case, *sides, **more)

    monkeypatch.setattr(evaluation, "score", unlucky)
    p, r = ({f"case_{n}": label_map(n + seed) for n in range(3)} for seed in (0, 10))
    result = evaluate(p, r)
    assert [(row["case"], row["error"]) for row in result.failed] == [("case_1", reason)]
    assert result.summary[0]["n"] == 2


def empty_pairs(n_empty: int, n_full: int, named: bool) -> tuple[dict[str, LabelMap], dict[str, LabelMap]]:
    """Predictions with one more lesion than the reference in the full cases."""
    array = np.zeros(GRID.shape, np.uint8)
    array[2:5, 3:6, 2:4] = 1
    more = array.copy()
    more[10:12, 8:10, 5:7] = 1
    names = (Structure(1, "tumour"),) if named else ()
    p, r = {}, {}
    for n in range(n_empty + n_full):
        both = (array * 0, array * 0) if n < n_empty else (more, array)
        p[f"case_{n}"], r[f"case_{n}"] = (LabelMap(a, GRID, names) for a in both)
    return p, r


@pytest.mark.parametrize("named", [False, True])
def test_cases_without_a_structure_count(named):
    result = evaluate(*empty_pairs(3, 2, named), lesions=True)
    entry = result.summary[0]
    assert (entry["n"], entry["n_defined"]) == (5, 2)
    assert [row["case"] for row in result.rows] == [f"case_{n}" for n in range(5)]
    assert [row["dice"] > 0 for row in result.rows] == [False] * 3 + [True] * 2
    assert entry["false_positives"]["mean"] == pytest.approx(2 / 5)
    assert set(result.rows[0]) == set(result.rows[-1])


def test_one_empty_pair_is_a_row():
    p, r = empty_pairs(1, 0, False)
    (row,) = evaluate(p["case_0"], r["case_0"]).rows
    assert (row["structure"], row["volume_mm3"], row["reference_volume_mm3"]) == ("label 1", 0, 0)
    assert np.isnan(row["dice"])


def test_a_case_in_which_nothing_was_drawn_is_listed():
    p, r = empty_pairs(1, 2, True)
    result = evaluate(p, r, labels_present=True)
    assert [row["case"] for row in result.rows] == ["case_0", "case_1", "case_2"]
    assert [row["error"] for row in result.failed] == [
        "reference must hold a structure to be scored by labels_present, got none"
    ]
    unnamed = evaluate(*empty_pairs(2, 1, False), labels_present={"case_1": ()})
    assert [("error" in row, row["case"]) for row in unnamed.rows] == [
        (False, "case_0"), (True, "case_1"), (False, "case_2")
    ]  # fmt: skip


def test_an_interrupted_evaluation_does_not_go_on(monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_WORKERS", 1)
    begun = []
    score = evaluation.score
    monkeypatch.setattr(evaluation, "score", lambda case, *a, **k: (begun.append(case), score(case, *a, **k))[1])

    def stop(done: int, count: int) -> None:
        raise KeyboardInterrupt

    cases = dict.fromkeys(range(60), label_map(1))
    with pytest.raises(KeyboardInterrupt):
        evaluate(cases, cases, progress=stop)
    assert len(begun) < 60


def test_folders_without_a_match(folders, tmp_path):
    p, r = folders
    with pytest.raises(FileNotFoundError, match="prediction folder must hold label maps, got none in"):
        (tmp_path / "empty").mkdir()
        evaluate(tmp_path / "empty", r)
    with pytest.raises(ValueError, match="must share case ids"):
        evaluate({"x": label_map(0)}, r)
    with pytest.raises(FileNotFoundError):
        evaluate(p / "case_1.nii.gz", r / "nowhere.nii.gz")
    (p / "case_1.nii").write_bytes(b"")
    with pytest.raises(ValueError, match=r"case ids must be unique in a folder, got case_1\.nii and case_1\.nii\.gz"):
        evaluate(p, r)
