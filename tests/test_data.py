"""Layouts of data sets, and folds against scikit-learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold

import medseg
from medseg.data import Case, folds, load_dataset, mark_absent
from medseg.volume import Geometry, LabelMap


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def make_cases(groups: list[str]) -> list[Case]:
    return [Case(f"c{n:03d}", (Path("x"),), None, g or f"c{n:03d}") for n, g in enumerate(groups)]


# --- folders


def test_pairs_of_same_name(tmp_path: Path) -> None:
    touch(tmp_path, "images/b.nii.gz", "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    touch(tmp_path, "images/._a.nii.gz", "images/readme.txt", "labels/.DS_Store")
    dataset = load_dataset(tmp_path)
    assert [c.id for c in dataset.cases] == ["a", "b"]
    assert dataset.cases[0] == Case("a", (tmp_path / "images/a.nii.gz",), tmp_path / "labels/a.nii.gz", "a")
    assert (dataset.name, dataset.channels, dataset.labels) == (tmp_path.name, ("image",), None)


def test_masks_of_another_suffix_in_capitals(tmp_path: Path) -> None:
    touch(tmp_path, "Images/1.jpg", "Masks/1.png")
    case = load_dataset(tmp_path).cases[0]
    assert (case.images[0].name, case.label and case.label.name) == ("1.jpg", "1.png")


def test_ids_are_file_names_where_unique_in_nested_folders(tmp_path: Path) -> None:
    touch(tmp_path, "Images/p1/x.png", "Images/p2/y.png", "Labels/p1/x.png", "Labels/p2/y.png")
    assert [c.id for c in load_dataset(tmp_path).cases] == ["x", "y"]


def test_ids_are_paths_where_file_names_repeat(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{part}/{p}/scan.nrrd" for part in ("images", "labels") for p in ("p1", "p2")))
    dataset = load_dataset(tmp_path, group="(p.)_")
    assert [(c.id, c.group) for c in dataset.cases] == [("p1_scan", "p1"), ("p2_scan", "p2")]
    assert dataset.cases[1].label == tmp_path / "labels/p2/scan.nrrd"


def test_a_folder_of_dicom_files_is_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "images/p1/1.dcm", "images/p1/2.dcm", "images/p2.nii.gz", "labels/p1.nii.gz", "labels/p2.dcm")
    cases = load_dataset(tmp_path).cases
    assert [c.images for c in cases] == [(tmp_path / "images/p1",), (tmp_path / "images/p2.nii.gz",)]
    assert [c.label.name for c in cases if c.label] == ["p1.nii.gz", "p2.dcm"]


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    assert [c.label for c in load_dataset(touch(tmp_path, "images/a.nii", "images/b.nii")).cases] == [None, None]


def test_channels_without_header(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0001.nii.gz", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [p.name for p in dataset.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert dataset.channels == ("channel 0", "channel 1")


def test_four_digits_in_a_name_are_no_channel_where_the_label_has_them(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{part}/{n}.nii.gz" for part in ("images", "labels") for n in ("case_0001", "case_0002")))
    assert [c.id for c in load_dataset(tmp_path).cases] == ["case_0001", "case_0002"]


def test_nnunet_version_2(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz")
    header = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "tumour": 2, "oedema": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    dataset = load_dataset(tmp_path)
    assert (dataset.channels, dataset.labels) == (("T1", "FLAIR"), {2: "tumour", 1: "oedema"})
    assert [c.id for c in dataset.cases] == ["a"]


def decathlon(root: Path, **changes: object) -> Path:
    header: dict[str, object] = {
        "name": "Liver",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("b", "a")],
    }
    (root / "dataset.json").write_text(json.dumps(header | changes))
    return root


def test_decathlon(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{p}/{n}.nii.gz" for p in ("imagesTr", "labelsTr") for n in ("a", "b", "not_listed")))
    dataset = load_dataset(decathlon(tmp_path))
    assert [c.id for c in dataset.cases] == ["a", "b"]
    assert (dataset.name, dataset.channels, dataset.labels) == ("Liver", ("CT",), {1: "liver", 2: "cancer"})


def test_decathlon_header_with_channel_files_of_nnunet_version_1(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"imagesTr/{n}_000{c}.nii.gz" for n in "ab" for c in (1, 0)),
        "labelsTr/a.nii.gz",
        "labelsTr/b.nii.gz",
    )
    dataset = load_dataset(decathlon(tmp_path, modality={"0": "CT", "1": "PET"}))
    assert [p.name for p in dataset.cases[1].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]


@pytest.mark.parametrize("name", ["../secret.nii.gz", "/etc/passwd", "imagesTr/../../secret.nii.gz", ".", 3])
def test_a_header_must_not_lead_outside(tmp_path: Path, name: object) -> None:
    touch(tmp_path, "secret.nii.gz", "set/imagesTr/a.nii.gz", "set/labelsTr/a.nii.gz")
    decathlon(tmp_path / "set", training=[{"image": name, "label": "labelsTr/a.nii.gz"}])
    with pytest.raises(ValueError, match="must lie inside its folder"):
        load_dataset(tmp_path / "set")


def test_listed_files_must_exist(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"must exist, got none for \./imagesTr/b\.nii\.gz"):
        load_dataset(decathlon(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, "x"]}}, "whole numbers with a name"),
        ({"labels": {"background": 0, "whole": [0, 1]}}, "distinct labels of at least 1"),
        ({"labels": {"background": 0, "whole": []}}, "distinct labels of at least 1"),
        ({"labels": {"a": 1, "b": [1, 2], "ignore": 2}}, "must not hold the label to be ignored, got 2"),
        ({"labels": {"a": 1, "b": [1, 2]}, "regions_class_order": [1]}, "one number per region"),
        ({"unknown": {"c": [1]}}, "must name cases of the set, got c"),
        ({"unknown": {"a": ["spleen"]}}, r"declares 1 liver, 2 cancer\), got 'spleen' for case a"),
        ({"unknown": {"a": [3]}}, "got 3 for case a"),
        ({"unknown": [1]}, "unknown must be like"),
        ({"labels": {"a": 1, "b": 1}}, "distinct numbers, got 1 twice"),
        ({"labels": ["liver"]}, "must be an object"),
        ({"modality": {"1": "CT"}}, 'numbered from "0"'),
        ({"training": {"a": 1}}, "must be a list"),
        ({"training": ["imagesTr/a.nii.gz"]}, "object with image and label"),
        ({"modality": {"0": "CT", "1": "PET", "2": "MR"}, "training": None}, "must be a list"),
        ({"training": []}, "at least one case"),
    ],
)
def test_wrong_headers(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    touch(tmp_path, *(f"{p}/{n}.nii.gz" for p in ("imagesTr", "labelsTr") for n in "ab"))
    with pytest.raises(ValueError, match=message):
        load_dataset(decathlon(tmp_path, **changes))


def test_a_header_must_be_json(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "dataset.json")
    with pytest.raises(ValueError, match="must be JSON"):
        load_dataset(tmp_path)


def test_a_case_may_lack_a_channel_but_not_all_cases(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "imagesTr/a_0000.nii",
        "imagesTr/a_0001.nii",
        "imagesTr/b_0000.nii",
        "labelsTr/a.nii",
        "labelsTr/b.nii",
    )
    a, b = load_dataset(tmp_path).cases
    assert b.images == (tmp_path / "imagesTr/b_0000.nii", None)
    assert None not in a.images
    (tmp_path / "imagesTr/b_0000.nii").rename(tmp_path / "imagesTr/b_0001.nii")
    assert load_dataset(tmp_path).cases[1].images == (None, tmp_path / "imagesTr/b_0001.nii")
    (tmp_path / "imagesTr/a_0000.nii").unlink()
    with pytest.raises(ValueError, match=r"every channel of .* must have image files"):
        load_dataset(tmp_path)
    touch(tmp_path, "imagesTr/a_0000.nii", "imagesTr/c.nii", "labelsTr/c.nii")
    with pytest.raises(ValueError, match="got 1 for 'c'"):
        load_dataset(tmp_path)


def test_missing_path_and_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data set must exist"):
        load_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be a folder with images/"):
        load_dataset(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="at least one case, got none"):
        load_dataset(tmp_path)


def test_missing_labels_and_images_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii", "images/b.nii", "labels/b.nii")
    with pytest.raises(FileNotFoundError, match="got none for a;"):
        load_dataset(tmp_path)
    touch(tmp_path, "labels/a.nii", "labels/c.nii")
    with pytest.raises(FileNotFoundError, match="got none for c;"):
        load_dataset(tmp_path)


def test_two_cases_of_one_id_are_both_named(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/a.nrrd", "labels/a.nii.gz")
    with pytest.raises(ValueError, match=r"must not share one id, got .*a\.nii\.gz and .*a\.nrrd"):
        load_dataset(tmp_path)


def test_two_label_folders_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii", "labels/a.nii", "masks/a.nii")
    with pytest.raises(ValueError, match="must have one folder of"):
        load_dataset(tmp_path)


def test_nnunet_regions_and_ignore_label(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    labels = {"background": 0, "whole": [2, 1, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    header = {"channel_names": {"0": "T1"}, "labels": labels, "regions_class_order": [1, 2, 3]}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    dataset = load_dataset(tmp_path)
    assert dataset.labels == {1: "label 1", 2: "label 2", 3: "enhancing"}
    assert list(dataset.regions.items()) == [("whole", (2, 1, 3)), ("core", (2, 3)), ("enhancing", (3,))]
    assert dataset.ignore == 4
    header["labels"] = {"background": 0, "liver": 1, "ignore": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    plain = load_dataset(tmp_path)
    assert (plain.labels, plain.regions, plain.ignore) == ({1: "liver"}, {}, 2)


def test_unknown_labels_of_a_header_by_number_or_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{p}/{n}.nii.gz" for p in ("imagesTr", "labelsTr") for n in "ab"))
    dataset = load_dataset(decathlon(tmp_path, unknown={"a": ["Cancer", "1"], "b": [2]}))
    assert [c.unknown for c in dataset.cases] == [(1, 2), (2,)]


def test_a_list_of_contoured_structures(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{p}/{n}.nii.gz" for p in ("images", "labels") for n in "ab"))
    cases = {"a": {"rois": ["Larynx", "PTV"]}, "b": {"rois": ["Cord", "Larynx"]}, "elsewhere": {"rois": []}}
    (tmp_path / "cases.json").write_text(json.dumps({"labels": {"1": "Cord", "2": "Larynx"}, "cases": cases}))
    dataset = load_dataset(tmp_path)
    assert dataset.labels == {1: "Cord", 2: "Larynx"}
    assert [c.unknown for c in dataset.cases] == [(1,), ()]
    (tmp_path / "cases.json").write_text('{"cases": ["a", "b"]}')  # someone else's file of that name
    assert load_dataset(tmp_path).labels is None


def test_a_folder_of_masks_is_one_label(tmp_path: Path) -> None:
    touch(tmp_path, "images/p1.nii.gz", "images/p2.nii.gz", "labels/p1/1_liver.nii.gz", "labels/p1/2_x y.nii.gz")
    touch(tmp_path, "labels/p2.nii.gz")
    assert [c.label for c in load_dataset(tmp_path).cases] == [tmp_path / "labels/p1", tmp_path / "labels/p2.nii.gz"]


def test_numbered_pictures_in_folders_are_no_masks(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{p}/p1/{n}_slice.png" for p in ("images", "labels") for n in (1, 2)))
    assert [c.id for c in load_dataset(tmp_path).cases] == ["1_slice", "2_slice"]


# --- labels that nobody drew


def save_labels(path: Path, *numbers: int) -> None:
    array = np.zeros((5, 4, 3), np.uint8)
    array.reshape(-1)[: len(numbers)] = numbers
    medseg.write(LabelMap(array, Geometry.from_parts(array.shape, (1.0, 2.0, 3.0))), path)


def test_absent_labels_are_unknown_where_asked(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{n}.nii.gz" for n in "abcd"))
    save_labels(tmp_path / "labels/a.nii.gz", 1, 2, 9)
    save_labels(tmp_path / "labels/b.nii.gz", 2, 2)
    save_labels(tmp_path / "labels/c.nii.gz")
    save_labels(tmp_path / "labels/d/1_x.nii.gz", 1)
    save_labels(tmp_path / "labels/d/4_y.nii.gz", 1, 1)
    assert {c.unknown for c in load_dataset(tmp_path).cases} == {()}
    found = [c.unknown for c in load_dataset(tmp_path, absent="unknown").cases]
    assert found == [(4,), (1, 4, 9), (1, 2, 4, 9), (2, 9)]
    header = {"labels": {"background": 0, "one": 1, "two": 2, "seven": 7, "ignore": 9}, "unknown": {"a": [1]}}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    seen: list[tuple[int, int]] = []
    dataset = mark_absent(load_dataset(tmp_path), workers=2, progress=lambda *n: seen.append(n))
    assert [c.unknown for c in dataset.cases] == [(1, 4, 7), (1, 4, 7), (1, 2, 4, 7), (2, 7)]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(ValueError, match="absent must be 'background' or 'unknown'"):
        load_dataset(tmp_path, absent="nothing")  # type: ignore[arg-type]


def test_images_of_a_set_without_labels_stay_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz")
    assert load_dataset(tmp_path, absent="unknown") == load_dataset(tmp_path)


# --- CSV


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    touch(tmp_path, "x/a1.nii", "x/a2.nii", "x/b1.nii", "x/b2.nii", "x/l.nii")
    text = "\ufeffCase, image_2,image,label,group\r\nb,x/b2.nii,x/b1.nii,,p1\r\na,x/a2.nii,x/a1.nii,x/l.nii,\r\n"
    dataset = load_dataset(write_csv(tmp_path / "set.csv", text))
    assert dataset.channels == ("image", "image_2")
    assert dataset.cases == (
        Case("a", (tmp_path / "x/a1.nii", tmp_path / "x/a2.nii"), tmp_path / "x/l.nii", "a"),
        Case("b", (tmp_path / "x/b1.nii", tmp_path / "x/b2.nii"), None, "p1"),
    )
    assert dataset.name == "set"


def test_csv_of_a_spreadsheet_with_semicolons(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    assert load_dataset(write_csv(tmp_path / "s.csv", "case;image\na;a.nii\n")).cases[0].images == (tmp_path / "a.nii",)


def test_csv_with_missing_channels_and_unknown_labels(tmp_path: Path) -> None:
    touch(tmp_path, "a1.nii", "a2.nii", "b2.nii", "l.nii")
    save_labels(tmp_path / "masks/1_x.nii.gz", 1)
    text = "case,image,image_2,label,unknown\na,a1.nii,a2.nii,l.nii,3; 1\nb,,b2.nii,masks,\n"
    a, b = load_dataset(write_csv(tmp_path / "set.csv", text)).cases
    assert (a.unknown, b.unknown) == ((1, 3), ())
    assert b.images == (None, tmp_path / "b2.nii")
    assert b.label == tmp_path / "masks"
    header = {"labels": {"background": 0, "liver": 1, "left kidney": 3}, "channel_names": {"0": "T1", "1": "T2"}}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    named = load_dataset(write_csv(tmp_path / "set.csv", text.replace("3; 1", "Left Kidney")))
    assert (named.labels, named.channels) == ({1: "liver", 3: "left kidney"}, ("T1", "T2"))
    assert named.cases[0].unknown == (3,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,image,unknown\na,a.nii,liver\n", r"declares none\), got 'liver' for row 2"),
        ("case,image,unknown\na,a.nii,0\n", "got '0' for row 2"),
        ("case,image,image_2\na,,\n", "fill case and image or image_2"),
        ("case,image,image_2\na,a.nii,\n", "filled in some row, got none for image_2"),
        ("case,image,lable\na,a.nii,\n", "columns must be"),
        ("case,picture\na,a.nii\n", "columns must be"),
        ("case,image,image\na,a.nii,a.nii\n", "columns must be"),
        ("", "columns must be"),
        ("case,image\n", "at least one case"),
        ("case,image\na,\n", "row 2"),
        ("case,image\na,a.nii\n,a.nii\n", "row 3"),
        ("case,image\na,a.nii,b.nii\n", "row 2"),
        ("case,image\n../a,a.nii\n", "fit for a file name"),
        ("case,image\na,a.nii\na,b.nii\n", r"must not share one id, got .*a\.nii and .*b\.nii"),
    ],
)
def test_wrong_csvs(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    with pytest.raises(ValueError, match=message):
        load_dataset(write_csv(tmp_path / "set.csv", text))


def test_csv_names_missing_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    with pytest.raises(FileNotFoundError, match=r"l\.nii"):
        load_dataset(write_csv(tmp_path / "set.csv", "case,image,label\na,a.nii,l.nii\n"))


def test_a_file_that_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="UTF-8"):
        load_dataset(tmp_path / "x.nii")


# --- groups and folds


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "regular expression"),
        ("p", "one capture group, got 0"),
        ("(q)", "no match for p1, p2"),
        ("(x?)", "no match"),
    ],
)
def test_wrong_group_patterns(tmp_path: Path, pattern: str, message: str) -> None:
    touch(tmp_path, "images/p1.nii", "images/p2.nii")
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path, group=pattern)


@given(n=st.integers(2, 60), k=st.integers(2, 7), seed=st.integers(0, 2**32 - 1))
def test_folds_without_groups_are_those_of_scikit_learn(n: int, k: int, seed: int) -> None:
    cases = make_cases([""] * n)
    if k > n:
        with pytest.raises(ValueError, match=f"between 2 and the number of groups \\({n}\\), got {k}"):
            folds(cases, k, seed)
        return
    expected = KFold(k, shuffle=True, random_state=seed).split(cases)
    got = folds(reversed(cases), k, seed)
    assert len(got) == k
    for (train, validation), (train_index, validation_index) in zip(got, expected, strict=True):
        assert train == tuple(cases[i] for i in train_index)
        assert validation == tuple(cases[i] for i in validation_index)


@given(
    groups=st.lists(st.sampled_from([f"p{n}" for n in range(12)]), min_size=8, max_size=80),
    k=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_folds_keep_groups_together_and_are_balanced(groups: list[str], k: int, seed: int) -> None:
    cases = make_cases(groups)
    distinct = sorted(set(groups))
    if k > len(distinct):
        with pytest.raises(ValueError, match="number of groups"):
            folds(cases, k, seed)
        return
    result = folds(cases, k, seed)
    assert result == folds(list(reversed(cases)), k, seed)
    assert sorted(c.id for _, validation in result for c in validation) == [c.id for c in cases]
    for train, validation in result:
        assert validation
        assert not {c.group for c in train} & {c.group for c in validation}
        assert sorted(c.id for c in (*train, *validation)) == [c.id for c in cases]
    sizes = [len(validation) for _, validation in result]
    assert max(sizes) - min(sizes) <= max(groups.count(g) for g in distinct)


def test_the_seed_moves_groups() -> None:
    cases = make_cases([f"p{n // 3}" for n in range(30)])
    assert folds(cases, 5, 1) != folds(cases, 5, 2)


@pytest.mark.data
def test_real_sets(data_dir: Path) -> None:
    hippocampus = load_dataset(data_dir / "hippocampus")
    assert (len(hippocampus.cases), hippocampus.labels) == (220, {1: "Anterior", 2: "Posterior"})
    heart = load_dataset(data_dir / "sunnybrook", group="(.+?)-IM-")
    assert (len(heart.cases), len({c.group for c in heart.cases})) == (526, 30)
    assert all(abs(len(validation) - 526 / 5) < 5 for _, validation in folds(heart.cases))
    assert len(load_dataset(data_dir / "kvasir").cases) == 200


@pytest.mark.data
def test_contoured_organs_are_those_of_the_files(data_dir: Path) -> None:
    """What ``cases.json`` lists and what the label files hold agree, so that either way gives the same."""
    listed = load_dataset(data_dir / "openkbp")
    if listed.labels is None:
        pytest.skip("cases.json not found")
    assert list(listed.labels.values())[:2] == ["Brainstem", "SpinalCord"]
    found = mark_absent(replace(listed, cases=tuple(replace(c, unknown=()) for c in listed.cases)))
    assert [c.unknown for c in found.cases] == [c.unknown for c in listed.cases]
    assert sum(5 in c.unknown for c in found.cases) == 15
