"""The doctor finds what is put into a healthy set, nothing else, and repairs a copy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import rotation
from PIL import Image

from medseg.data import load_dataset
from medseg.doctor import Checkup, check

SHAPE = (13, 10, 7)
AFFINE = np.eye(4)
AFFINE[:3, :3] = rotation((0.2, -0.1, 0.3)) * (0.9, 1.3, 2.5)
AFFINE[:3, 3] = (-31.0, 12.0, 55.0)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_data_dtype(array.dtype)
    nib.save(image, path)
    return path


def image_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(500, 100, SHAPE).astype(np.float32)


def label_of(n: int) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[2:6, 2 : 5 + n % 3, 2:5] = 1
    label[7:11, 3:7, 1:4] = 2
    return label


def make_set(root: Path, count: int = 7) -> Path:
    for n in range(count):
        save(root / f"imagesTr/c{n}_0000.nii.gz", image_of(n))
        save(root / f"labelsTr/c{n}.nii.gz", label_of(n))
    header = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "front": 1, "back": 2}}
    (root / "dataset.json").write_text(json.dumps(header))
    return root


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set")


def kinds(checkup: Checkup) -> list[tuple[str, str, str]]:
    return [(f.severity, f.case, f.what) for f in checkup.findings]


def test_nothing_is_said_of_a_healthy_set(healthy: Path) -> None:
    checkup = check(healthy)
    assert checkup.findings == ()
    assert not checkup.errors
    assert "nothing to report" in str(checkup)
    structures = json.loads(checkup.to_json())["summary"]["structures"]
    expected = sum(int((label_of(n) == 1).sum()) for n in range(7))
    assert structures[0] == {"number": 1, "name": "front", "cases": 7, "unknown": 0, "voxels": expected}


def test_progress_and_threads_change_nothing(healthy: Path) -> None:
    save(healthy / "labelsTr/c3.nii.gz", label_of(3) * 3)
    seen: list[tuple[int, int]] = []
    one = check(healthy, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 7) for n in range(1, 8)]
    assert one.findings == check(healthy, workers=4).findings


# --- one case


def test_grids_that_differ_are_told_in_mm(healthy: Path) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += (3.0, 4.0, 0.0)
    save(healthy / "labelsTr/c1.nii.gz", label_of(1), moved)
    save(healthy / "labelsTr/c2.nii.gz", label_of(2)[:-1])
    checkup = check(healthy)
    assert kinds(checkup) == [("error", c, "image and label differ in grid") for c in ("c1", "c2")]
    assert "5.000 mm apart" in checkup.findings[0].detail
    assert "shapes (12, 10, 7) and (13, 10, 7)" in checkup.findings[1].detail


def test_images_of_a_case_on_different_grids(tmp_path: Path) -> None:
    make_set(tmp_path)
    for n in range(7):
        save(
            tmp_path / f"imagesTr/c{n}_0001.nii.gz", image_of(n + 50), AFFINE if n else AFFINE @ np.diag([1, 1, 1.1, 1])
        )
    (tmp_path / "dataset.json").unlink()
    assert kinds(check(tmp_path)) == [("error", "c0", "images of a case differ in grid")]


@pytest.mark.parametrize(
    ("label", "what", "detail"),
    [
        (label_of(1) * 3, "labels not declared", "3 ("),
        (label_of(1).astype(np.float32) * 0.7, "labels not integer", "0.7"),
        (label_of(1).astype(np.int16) - 1, "labels not declared", "-1 ("),
        (
            np.where(label_of(1) == 1, np.nan, 0).astype(np.float32),
            "NaN or infinity in label",
            "voxels of the label c1",
        ),
        (label_of(1) * 0, "empty label", "background only"),
        (label_of(1).astype(np.float32), "labels stored as float", "float32"),
    ],
)
def test_wrong_labels(healthy: Path, label: np.ndarray, what: str, detail: str) -> None:
    save(healthy / "labelsTr/c1.nii.gz", label)
    found = [f for f in check(healthy).findings if f.what == what]
    assert [f.case for f in found] == ["c1"]
    assert detail in found[0].detail


def test_wrong_images(healthy: Path) -> None:
    image = image_of(0)
    image[3, 4, :2] = np.nan, np.inf
    save(healthy / "imagesTr/c0_0000.nii.gz", image)
    save(healthy / "imagesTr/c1_0000.nii.gz", np.full(SHAPE, 7, np.float32))
    save(healthy / "imagesTr/c4_0000.nii.gz", np.full(SHAPE, np.nan, np.float32))
    whole = (healthy / "imagesTr/c2_0000.nii.gz").read_bytes()
    (healthy / "imagesTr/c2_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (healthy / "labelsTr/c3.nii.gz").write_bytes(b"")
    checkup = check(healthy)
    assert kinds(checkup) == [
        ("error", "c0", "NaN or infinity in image"),
        ("error", "c2", "image not readable"),
        ("error", "c3", "label not readable"),
        ("error", "c4", "NaN or infinity in image"),
        ("warning", "c1", "constant image"),
    ]
    assert "2 of 910 voxels" in checkup.findings[0].detail


def test_header_that_contradicts_itself_is_noted_not_warned(healthy: Path) -> None:
    image = nib.load(healthy / "imagesTr/c0_0000.nii.gz")
    image.set_qform(np.diag([1, 1, 1, 1.0]), 1)
    nib.save(image, healthy / "imagesTr/c0_0000.nii.gz")
    assert kinds(check(healthy)) == [("note", "c0", "unusual file")]


def test_skewed_grid(healthy: Path) -> None:
    skew = AFFINE.copy()
    skew[:3, 2] += 0.2 * skew[:3, 1]
    save(healthy / "imagesTr/c0_0000.nii.gz", image_of(0), skew)
    save(healthy / "labelsTr/c0.nii.gz", label_of(0), skew)
    assert kinds(check(healthy)) == [("warning", "c0", "skewed grid")]


# --- cases together


@pytest.mark.parametrize(("factor", "is_outlier"), [(300.0, True), (1 / 300.0, True), (8.0, False), (0.2, False)])
def test_intensity_outliers(healthy: Path, factor: float, is_outlier: bool) -> None:
    save(healthy / "imagesTr/c4_0000.nii.gz", image_of(4) * np.float32(factor))
    expected = [("warning", "c4", "intensity outlier")] if is_outlier else []
    assert kinds(check(healthy)) == expected


def test_a_second_large_scale_in_the_set_is_still_found(tmp_path: Path) -> None:
    make_set(tmp_path, 20)
    for n in (3, 8, 11):
        save(tmp_path / f"imagesTr/c{n}_0000.nii.gz", image_of(n) * np.float32(500))
    assert sorted(c for _, c, what in kinds(check(tmp_path)) if what == "intensity outlier") == ["c11", "c3", "c8"]


@pytest.mark.parametrize(("scale", "is_outlier"), [((1, 1, 4), True), ((0.25, 1, 1), True), ((1.5, 1.5, 1), False)])
def test_spacing_outliers(healthy: Path, scale: tuple[float, ...], is_outlier: bool) -> None:
    affine = AFFINE @ np.diag([*scale, 1])
    save(healthy / "imagesTr/c4_0000.nii.gz", image_of(4), affine)
    save(healthy / "labelsTr/c4.nii.gz", label_of(4), affine)
    assert kinds(check(healthy)) == ([("warning", "c4", "spacing outlier")] if is_outlier else [])


def test_axes_in_another_order_are_no_spacing_outlier(healthy: Path) -> None:
    turned = AFFINE[:, [2, 0, 1, 3]]
    save(healthy / "imagesTr/c4_0000.nii.gz", np.transpose(image_of(4), (2, 0, 1)), turned)
    save(healthy / "labelsTr/c4.nii.gz", np.transpose(label_of(4), (2, 0, 1)), turned)
    assert kinds(check(healthy)) == [("note", "", "orientations differ")]


@pytest.mark.parametrize(("group", "severity"), [(None, "error"), ("(c)", "warning")])
def test_same_image_twice(healthy: Path, group: str | None, severity: str) -> None:
    image = np.round(image_of(2))
    save(healthy / "imagesTr/c2_0000.nii.gz", image)
    save(healthy / "imagesTr/c5_0000.nii.gz", image.astype(np.int16))
    found = [f for f in check(healthy, group=group).findings if f.what == "same image twice"]
    assert [(f.severity, f.case) for f in found] == [(severity, "c2")]
    assert "c2, c5" in found[0].detail


def test_patient_on_both_sides_of_a_split(healthy: Path) -> None:
    splits = [
        {"train": ["c0", "c1"], "val": ["c2", "c3"]},
        {"train": ["c0", "c4"], "val": ["c4"]},
        {"train": ["c9"], "val": []},
    ]
    (healthy / "splits_final.json").write_text(json.dumps(splits))
    assert kinds(check(healthy)) == [
        ("error", "", "one patient on both sides of a split"),
        ("warning", "", "split names unknown cases"),
    ]
    (healthy / "splits_final.json").write_text("[{}]")
    assert kinds(check(healthy)) == [("error", "", "splits not readable")]


def test_ids_that_name_several_images_of_a_patient(tmp_path: Path) -> None:
    for n in range(6):
        save(tmp_path / f"images/p{n // 2}-slice{n:02d}.nii.gz", image_of(n))
        save(tmp_path / f"labels/p{n // 2}-slice{n:02d}.nii.gz", label_of(n))
    assert kinds(check(tmp_path)) == [("warning", "", "patients may share a split")]
    remedy = check(tmp_path).findings[0].remedy
    assert kinds(check(tmp_path, group=remedy.split("'")[1])) == []
    assert kinds(check(tmp_path, group=r"(p\d)-")) == []


def test_structures_missing_in_parts_and_never_there(healthy: Path) -> None:
    header = json.loads((healthy / "dataset.json").read_text())
    header["labels"]["ghost"] = 7
    (healthy / "dataset.json").write_text(json.dumps(header))
    label = label_of(1)
    label[label == 2] = 0
    label[12, 9, 6] = 1
    save(healthy / "labelsTr/c1.nii.gz", label)
    checkup = check(healthy)
    assert kinds(checkup) == [
        ("warning", "", "structure in no case"),
        ("note", "c1", "structure in several parts"),
        ("note", "", "structure missing in some cases"),
    ]
    # From (12, 9, 6) to the nearest voxel of the block that ends at (5, 5, 4), along axes at right angles.
    expected = float(np.linalg.norm(np.array([7, 4, 2]) * (0.9, 1.3, 2.5)))
    assert f"one of 1 voxels {expected:.1f} mm away; it is one part in 6 of 7" in checkup.findings[1].detail
    assert "back (2) is in 6 of 7 labelled cases, not in c1" in checkup.findings[2].detail


def test_labels_that_number_objects_are_not_taken_for_structures(tmp_path: Path) -> None:
    for n in range(6):
        label = np.zeros(SHAPE, np.uint16)
        places = np.random.default_rng(n).permutation(label.size)[: 12 + n]
        label.flat[places] = np.arange(1, len(places) + 1)
        save(tmp_path / f"images/c{n}.nii.gz", image_of(n))
        save(tmp_path / f"labels/c{n}.nii.gz", label)
    assert kinds(check(tmp_path)) == [("note", "", "labels number objects")]


def test_few_cases_and_types_that_differ(tmp_path: Path) -> None:
    make_set(tmp_path, 3)
    save(tmp_path / "imagesTr/c0_0000.nii.gz", image_of(0).astype(np.int16))
    assert kinds(check(tmp_path)) == [("note", "", "stored types differ"), ("note", "", "very few cases")]


def test_number_of_channels_that_differs(healthy: Path) -> None:
    save(healthy / "imagesTr/c3_0000.nii.gz", np.stack([image_of(3), image_of(33)], axis=3))
    assert ("error", "c3", "number of channels differs") in kinds(check(healthy))


def test_text_groups_findings_of_one_kind(healthy: Path) -> None:
    for n in range(5):
        save(healthy / f"labelsTr/c{n}.nii.gz", label_of(n).astype(np.float64))
    text = str(check(healthy))
    assert "note: labels stored as float: 5 cases: c0, c1, c2, c3, c4" in text
    assert text.count("--fix stores them as integers") == 1


# --- repairs


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_repaired_copy(healthy: Path, tmp_path: Path) -> None:
    bad = image_of(0)
    bad[1, 2, 3] = np.nan
    save(healthy / "imagesTr/c0_0000.nii.gz", bad)
    save(healthy / "labelsTr/c1.nii.gz", label_of(1).astype(np.float32))
    shift = np.eye(4)
    shift[:3, 3] = (1, 0, -1)  # the label lies one voxel further along i and one back along k
    save(healthy / "labelsTr/c2.nii.gz", label_of(2), AFFINE @ shift)
    soft = np.where(label_of(3) == 1, 0.75, 0.25).astype(np.float32)
    save(healthy / "labelsTr/c3.nii.gz", soft)
    save(healthy / "labelsTr/c4.nii.gz", label_of(4).astype(np.float32) * 1.3)
    rounded = AFFINE.copy()
    rounded[:3, 3] += 0.03
    save(healthy / "labelsTr/c5.nii.gz", label_of(5), rounded)
    holes = label_of(6).astype(np.float32)
    holes[7] = np.nan
    save(healthy / "labelsTr/c6.nii.gz", holes)
    before = hashes(healthy)

    checkup = check(healthy, fix=tmp_path / "out")

    assert hashes(healthy) == before
    out = tmp_path / "out"
    done = [(r.case, r.what) for r in checkup.repairs]
    assert done == [
        ("c0", "NaN or infinity filled"),
        ("c1", "stored as integers"),
        ("c2", "put on the image's grid"),
        ("c3", "cut at 0.5"),
        ("c5", "put on the image's grid"),
        ("c6", "NaN or infinity made background"),
        ("c6", "stored as integers"),
    ]

    def voxels(name: str) -> np.ndarray:
        return np.asarray(nib.load(out / name).dataobj)

    expected = bad.copy()
    expected[1, 2, 3] = np.nanmin(bad)
    assert np.array_equal(voxels("imagesTr/c0_0000.nii.gz"), expected)
    one = nib.load(out / "labelsTr/c1.nii.gz")
    assert one.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(one.dataobj), label_of(1))
    shifted = np.zeros(SHAPE, np.uint8)
    shifted[1:, :, :-1] = label_of(2)[:-1, :, 1:]
    assert np.array_equal(voxels("labelsTr/c2.nii.gz"), shifted)
    assert np.allclose(nib.load(out / "labelsTr/c2.nii.gz").affine, AFFINE, atol=1e-5)
    assert np.array_equal(voxels("labelsTr/c3.nii.gz"), label_of(3) == 1)
    assert np.array_equal(voxels("labelsTr/c5.nii.gz"), label_of(5))
    assert np.array_equal(voxels("labelsTr/c6.nii.gz"), np.nan_to_num(holes).astype(np.uint8))
    untouched = [n for n in range(7) if n != 0]
    assert all(
        (out / f"imagesTr/c{n}_0000.nii.gz").read_bytes() == (healthy / f"imagesTr/c{n}_0000.nii.gz").read_bytes()
        for n in untouched
    )
    log = json.loads((out / "repairs.json").read_text())
    assert [(r["case"], r["what"]) for r in log["repairs"]] == done
    assert [(f["case"], f["what"]) for f in log["not_repaired"] if f["severity"] == "error"] == [
        ("c4", "labels not integer")
    ]
    again = check(out)
    assert [(f.case, f.what) for f in again.errors] == [("c4", "labels not integer")]
    assert again.dataset.labels == {1: "front", 2: "back"}
    assert again.dataset.channels == ("MRI",)


def test_a_label_that_nowhere_meets_its_image_stays(healthy: Path, tmp_path: Path) -> None:
    far = AFFINE.copy()
    far[:3, 3] += 1000
    save(healthy / "labelsTr/c1.nii.gz", label_of(1), far)
    checkup = check(healthy, fix=tmp_path / "out")
    assert checkup.repairs == ()
    assert np.allclose(nib.load(tmp_path / "out/labelsTr/c1.nii.gz").affine, far, atol=1e-4)


def test_a_copy_keeps_groups_missing_labels_and_splits(tmp_path: Path) -> None:
    rows = ["case,image,image_2,label,group"]
    for n in range(5):
        save(tmp_path / f"x/a{n}.nii.gz", image_of(n))
        save(tmp_path / f"x/b{n}.nii.gz", image_of(n + 30))
        save(tmp_path / f"x/l{n}.nii.gz", label_of(n).astype(np.float32))
        rows.append(f"c{n},x/a{n}.nii.gz,x/b{n}.nii.gz,{f'x/l{n}.nii.gz' if n else ''},p{n // 2}")
    (tmp_path / "set.csv").write_text("\n".join(rows))
    (tmp_path / "splits_final.json").write_text('[{"train": ["c0", "c1"], "val": ["c2"]}]')
    source = load_dataset(tmp_path / "set.csv")
    checkup = check(source, fix=tmp_path / "out")
    copy = load_dataset(tmp_path / "out/cases.csv")
    assert [(c.id, c.group, c.label is None, len(c.images)) for c in copy.cases] == [
        (c.id, c.group, c.label is None, 2) for c in source.cases
    ]
    assert [r.case for r in checkup.repairs] == ["c1", "c2", "c3", "c4"]
    assert (tmp_path / "out/splits_final.json").read_text() == (tmp_path / "splits_final.json").read_text()
    assert check(copy).errors == ()


def test_an_output_that_exists_is_refused_at_once(healthy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="output must not exist yet"):
        check(healthy, fix=tmp_path / "out", progress=lambda *_: pytest.fail("files were read"))


def test_nothing_is_left_of_a_copy_that_fails(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medseg.repair._write_headers", full)
    with pytest.raises(OSError, match="No space left"):
        check(healthy, fix=tmp_path / "copies/out")
    assert list((tmp_path / "copies").iterdir()) == []


def make_pictures(root: Path, suffix: str, count: int = 6) -> Path:
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for n in range(count):
        random = np.random.default_rng(n)
        mask = np.zeros((40, 56), np.uint8)
        mask[8:30, 10 : 30 + n] = 255
        Image.fromarray(random.integers(0, 255, (40, 56, 3), np.uint8)).save(root / f"images/{n}.png")
        Image.fromarray(mask).save(root / f"masks/{n}{suffix}", quality=60)
    return root


def test_lossy_masks_are_said_and_cut_at_128(tmp_path: Path) -> None:
    checkup = check(make_pictures(tmp_path / "set", ".jpg"), fix=tmp_path / "out")
    assert [(f.severity, f.what) for f in checkup.findings] == [
        *[("warning", "lossy label")] * 6,
        ("note", "unusual files"),
    ]
    assert [r.what for r in checkup.repairs] == ["cut at 128"] * 6
    for n in range(6):
        stored = np.asarray(Image.open(tmp_path / f"set/masks/{n}.jpg"))
        assert len(np.unique(stored)) > 2
        mended = np.asarray(Image.open(tmp_path / f"out/labelsTr/{n}.png"))
        assert np.array_equal(mended, stored >= 128)
    assert check(tmp_path / "out").errors == ()


def test_masks_of_0_and_255_are_one_structure(tmp_path: Path) -> None:
    checkup = check(make_pictures(tmp_path, ".png"))
    assert kinds(checkup) == [("note", "", "one structure"), ("note", "", "unusual files")]
    assert "0 and 255" in checkup.findings[0].detail


# --- labels as they are


def test_missing_channels_unknown_and_ignored_labels_are_said_and_copied(tmp_path: Path) -> None:
    rows = ["case,image,image_2,label,unknown"]
    for n in range(5):
        save(tmp_path / f"x/a{n}.nii.gz", image_of(n))
        save(tmp_path / f"x/b{n}.nii.gz", image_of(n + 30))
        label = label_of(n)
        label[0, 0, 0] = 3
        label[label == 2] = 0 if n == 1 else 2
        save(tmp_path / f"x/l{n}.nii.gz", label)
        first = "" if n == 2 else f"x/a{n}.nii.gz"
        rows.append(f"c{n},{first},{'' if n == 3 else f'x/b{n}.nii.gz'},x/l{n}.nii.gz,{'2' if n in (1, 4) else ''}")
    (tmp_path / "set.csv").write_text("\n".join(rows))
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "front": 1, "back": 2, "ignore": 3}}')
    checkup = check(tmp_path / "set.csv", fix=tmp_path / "out")
    assert kinds(checkup) == [
        ("note", "c2", "channel missing"),
        ("note", "c3", "channel missing"),
        ("note", "c4", "unknown label is there"),
        ("note", "", "structure unknown in some cases"),
    ]
    assert {s["name"]: (s["cases"], s["unknown"]) for s in checkup.summary["structures"]} == {
        "front": (5, 0),
        "back": (4, 1),
    }
    assert "channel 0" in next(f.detail for f in checkup.findings if f.case == "c2")
    source, copy = load_dataset(tmp_path / "set.csv"), load_dataset(tmp_path / "out")
    assert [c.unknown for c in copy.cases] == [c.unknown for c in source.cases]
    assert [[p is None for p in c.images] for c in copy.cases] == [[p is None for p in c.images] for c in source.cases]
    assert (copy.labels, copy.ignore) == (source.labels, 3)
    assert kinds(check(copy)) == kinds(checkup)


def test_regions_are_copied(healthy: Path, tmp_path: Path) -> None:
    header = json.loads((healthy / "dataset.json").read_text())
    header["labels"] = {"background": 0, "whole": [1, 2], "back": 2, "ignore": 5}
    (healthy / "dataset.json").write_text(json.dumps(header))
    checkup = check(healthy, fix=tmp_path / "out")
    assert checkup.errors == ()
    copy = load_dataset(tmp_path / "out")
    assert dict(copy.regions) == {"whole": (1, 2), "back": (2,)}
    assert (copy.labels, copy.ignore) == ({1: "label 1", 2: "back"}, 5)


def test_too_many_labels_are_one_finding(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / f"images/c{n}.nii.gz", image_of(n))
        random = np.random.default_rng(n).integers(2, 100_000, SHAPE).astype(np.int32)
        save(tmp_path / f"labels/c{n}.nii.gz", random)
    errors = check(tmp_path).errors
    assert [(f.case, f.what) for f in errors] == [("", "too many labels")]
    assert "more than the 255" in errors[0].detail


def test_layers_that_overlap_are_looked_at_one_by_one(tmp_path: Path) -> None:
    for n in range(5):
        save(tmp_path / f"images/c{n}.nii.gz", image_of(n))
        for name, number in (("1_front", 1), ("2_back", 2)):
            mask = (label_of(n) == number).astype(np.uint8)
            mask[4:9, 3:6, 2:4] = 1
            save(tmp_path / f"labels/c{n}/{name}.nii.gz", mask)
    checkup = check(tmp_path, fix=tmp_path / "out")
    assert kinds(checkup) == []
    assert [s["cases"] for s in checkup.summary["structures"]] == [5, 5]
    assert [c.label and c.label.is_dir() for c in load_dataset(tmp_path / "out").cases] == [True] * 5


# --- real data


@pytest.mark.data
def test_hippocampus(data_dir: Path) -> None:
    checkup = check(data_dir / "hippocampus")
    assert checkup.errors == ()
    of = {what: {f.case for f in checkup.findings if f.what == what} for _, _, what in kinds(checkup)}
    maxima = {p.name[:-7]: float(nib.load(p).get_fdata().max()) for p in (data_dir / "hippocampus/imagesTr").iterdir()}
    assert of.pop("intensity outlier") == {name for name, m in maxima.items() if m > 3e5}
    assert of.pop("labels stored as float") == {"hippocampus_003", "hippocampus_243"}
    assert "hippocampus_156" in of.pop("structure in several parts")
    assert of == {"stored types differ": {""}}


@pytest.mark.data
def test_partial_labels_of_real_ct(data_dir: Path) -> None:
    checkup = check(data_dir / "openkbp")
    assert not [f for f in checkup.findings if f.severity != "note"]
    unknown = [f.detail for f in checkup.findings if f.what == "structure unknown in some cases"]
    assert unknown == [
        "Esophagus (5) was not drawn in 15 of 49 labelled cases", "Larynx (6) was not drawn in 12 of 49 labelled cases"
    ]  # fmt: skip
    assert "Esophagus (5): in 34 cases, unknown in 15" in str(checkup)


@pytest.mark.data
def test_real_pictures(data_dir: Path) -> None:
    heart = check(data_dir / "sunnybrook")
    assert kinds(heart) == [
        ("warning", "", "patients may share a split"),
        ("note", "", "one structure"),
        ("note", "", "unusual files"),
    ]
    polyps = check(data_dir / "kvasir")
    assert polyps.errors == ()
    assert [f.severity for f in polyps.findings if f.what == "lossy label"] == ["warning"] * 200
