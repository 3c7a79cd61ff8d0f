"""Which images paths name, and prediction of several of them (with a network that is not trained)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import geometries
from hypothesis import given
from hypothesis import strategies as st

import medseg
from medseg.batch import Input, find_inputs, labels_of, predict_files
from medseg.inference import Predictor
from medseg.io.dicom_write import write_series
from medseg.volume import Geometry, Structure, Volume


def files(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"not looked into")
    return [folder / name for name in names]


def found(paths: list[Path], channels: int = 1) -> dict[str, list[str]]:
    return {one.name: [p.name for p in one.paths] for one in find_inputs(paths, channels)}


def test_files_and_folders_give_the_same_images(tmp_path: Path) -> None:
    names = ("a_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "whole.nrrd", "IXI_0012.mha")
    expected = {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
        "whole": ["whole.nrrd"],
        "IXI_0012": ["IXI_0012.mha"],
    }
    paths = files(tmp_path / "two", *names)
    assert found(paths, 2) == expected
    assert found([tmp_path / "two"], 2) == expected


def test_ending_0000_goes_only_where_all_have_it(tmp_path: Path) -> None:
    paths = files(tmp_path / "all", "a_0000.nii.gz", "b_0000.nii.gz")
    assert found([tmp_path / "all"]) == found(paths) == {"a": ["a_0000.nii.gz"], "b": ["b_0000.nii.gz"]}
    files(tmp_path / "some", "a_0000.nii.gz", "a_0001.nii.gz")
    assert list(found([tmp_path / "some"])) == ["a_0000", "a_0001"]


@pytest.mark.parametrize(
    ("names", "channels"),
    [
        (("a_0000.nii", "a_0001.nii"), 3),
        (("a_0000.nii", "a_0001.nii", "a_0002.nii"), 2),
        (("a_0001.nii", "a_0002.nii"), 2),
        (("a_0000.nii", "a_0000.nrrd"), 2),
    ],
)
def test_channel_files_are_counted(tmp_path: Path, names: tuple[str, ...], channels: int) -> None:
    files(tmp_path, *names, "b.nii")
    with pytest.raises(ValueError, match=rf"{channels} files _0000 to _000{channels - 1}, got a_000.* for a in "):
        find_inputs([tmp_path], channels)


def test_dicom_and_other_files_in_one_folder(tmp_path: Path) -> None:
    write_series(tiny.case(1)[0], tmp_path / "scan" / "inner", description="x", modality="MR")
    files(tmp_path / "scan", "screenshot.png", "notes.txt")
    for folder in (tmp_path / "scan", tmp_path / "scan" / "inner"):
        (one,) = find_inputs([folder], 1)
        assert (one.name, one.paths, one.dicom) == (folder.name, (folder,), True)
    files(tmp_path / "scan", "other.nii.gz")
    with pytest.raises(ValueError, match=r"DICOM or other volumes, got inner.* and other.nii.gz in "):
        find_inputs([tmp_path / "scan"], 1)


def test_what_names_no_image_is_refused(tmp_path: Path) -> None:
    files(tmp_path / "text", "notes.txt")
    (tmp_path / "empty").mkdir()
    paths = files(tmp_path / "one", "a.nii", "a.nrrd")
    with pytest.raises(FileNotFoundError, match=r"must exist, got .*missing"):
        find_inputs([tmp_path / "missing"], 1)
    with pytest.raises(FileNotFoundError, match=r"must hold images, got no file in .*empty"):
        find_inputs([tmp_path / "empty"], 1)
    with pytest.raises(FileNotFoundError, match=r"must hold images, got none in .*text"):
        find_inputs([tmp_path / "text"], 1)
    for twice in ([tmp_path / "one"], paths, [paths[0], paths[0]]):
        for channels in (1, 2):
            with pytest.raises(ValueError, match="distinct names, got a twice"):
                find_inputs(twice, channels)
    with pytest.raises(ValueError, match=r"series must be given for DICOM only, got '1.2' for .*a.nii"):
        find_inputs(paths[:1], 1, "1.2")


class Net(torch.nn.Module):
    """Logits that follow the intensity: bright is structure 1, dark is structure 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), 4 * (x - 1.5), 4 * (-x - 1.5)], 1)


class Counting(Predictor):
    """Counts its predictions."""

    calls: list[Volume] = []

    def predict(self, image: Volume, **options: Any) -> Any:
        self.calls.append(image)
        return super().predict(image, **options)


@pytest.fixture
def predictor() -> Counting:
    Counting.calls.clear()
    return Counting(tiny.plan(), Net(), torch.device("cpu"))


def images(folder: Path, count: int) -> list[Input]:
    for n in range(count):
        medseg.write(tiny.case(n)[0], folder / f"i{n}.nii.gz")
    return find_inputs([folder], 1)


def test_probabilities_hold_the_structures(tmp_path: Path, predictor: Counting) -> None:
    done = predict_files(
        predictor, images(tmp_path / "in", 1), tmp_path / "out", to=("nifti", "nrrd"), probabilities=True
    )
    assert not done.failed
    assert [p.name for p in done.written["i0"]] == ["i0.nii.gz", "i0.nrrd", "i0_probabilities.nii.gz"]
    labels, soft = medseg.read_labels(done.written["i0"][0]), medseg.read(done.written["i0"][2])
    assert {2, 5} <= set(np.unique(labels.array).tolist())
    assert soft.meta["structures"] == labels.structures
    again = labels_of(soft)
    assert np.array_equal(again.array, labels.array)
    assert again.names == {2: "bright", 5: "dark"}
    image, _ = tiny.case(0)
    mean = {n: float(image.array[0][labels.array == n].mean()) for n in (0, 2, 5)}
    assert mean[5] < mean[0] < mean[2]


def test_one_bad_input_does_not_stop_the_others(tmp_path: Path, predictor: Counting) -> None:
    inputs = images(tmp_path / "in", 3)
    inputs[1].paths[0].write_bytes(b"no image")
    done = predict_files(predictor, inputs, tmp_path / "out")
    assert list(done.written) == ["i0", "i2"]
    assert list(done.failed) == ["i1"]
    assert str(inputs[1].paths[0]) in done.failed["i1"]
    four = Volume(np.zeros((4, 5, 6, 7), np.int16), Geometry((5, 6, 7), np.diag([1.0, 2, 3, 1])))
    medseg.write(four, tmp_path / "four.nii")
    done = predict_files(predictor, find_inputs([tmp_path / "four.nii"], 1), tmp_path / "out")
    assert str(tmp_path / "four.nii") in done.failed["four"]  # what the model says against it does not know the file


@pytest.mark.parametrize("blocking", ["i1.nii.gz", "i1_probabilities.nii.gz"])
def test_outputs_are_looked_at_before_anything_is_predicted(tmp_path: Path, predictor: Counting, blocking: str) -> None:
    inputs = images(tmp_path / "in", 2)
    files(tmp_path / "out", blocking)
    with pytest.raises(FileExistsError, match=blocking):
        predict_files(predictor, inputs, tmp_path / "out", probabilities=True)
    assert not predictor.calls
    done = predict_files(predictor, inputs, tmp_path / "out", probabilities=True, force=True)
    assert len(done.written) == 2
    assert medseg.read(done.written["i1"][1]).channels == 3


def test_outputs_that_cannot_be(tmp_path: Path, predictor: Counting) -> None:
    inputs = images(tmp_path / "in", 1)
    (file,) = files(tmp_path, "file")
    for out in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=r"must go into a folder, got the file .*file;"):
            predict_files(predictor, inputs, out)
    with pytest.raises(ValueError, match="format must be one of nifti, nrrd, seg, rtstruct, got 'gif'"):
        predict_files(predictor, inputs, tmp_path / "out", to=("gif",))
    with pytest.raises(ValueError, match=r"DICOM series for --to seg, got .*i0.nii.gz"):
        predict_files(predictor, inputs, tmp_path / "out", to=("seg",))
    clash = [*inputs, Input("i0_probabilities", inputs[0].paths)]
    with pytest.raises(ValueError, match=r"distinct names, got i0_probabilities.nii.gz twice"):
        predict_files(predictor, clash, tmp_path / "out", probabilities=True)
    assert not predictor.calls
    assert not (tmp_path / "out").exists()


@given(geometries(), st.integers(2, 5), st.integers(0, 1000))
def test_labels_of_probabilities(geometry: Geometry, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    array = generator.random((classes, *geometry.shape)).astype(np.float32)
    structures = tuple(Structure(70 * c + 1, f"s{c}") for c in range(1, classes))
    labels = labels_of(Volume(array, geometry, {"structures": structures}))
    assert labels.geometry == geometry
    assert labels.structures == structures
    numbers = [0, *(s.number for s in structures)]
    for index in np.ndindex(geometry.shape):
        column = [float(channel[index]) for channel in array]
        assert labels.array[index] == numbers[column.index(max(column))]
    plain = labels_of(Volume(array, geometry))
    assert plain.names == {c: f"label {c}" for c in range(1, classes)}
    assert np.array_equal(np.searchsorted(numbers, labels.array), plain.array)
    single = labels_of(Volume(array[:1], geometry))
    assert np.array_equal(single.array, array[0] >= 0.5)
    assert single.names == {1: "label 1"}


def test_files_bear_the_numbers_of_the_channels_that_are_there(tmp_path: Path) -> None:
    for number in (0, 2):
        (tmp_path / f"a_{number:04d}.nii").write_text("")
    (one,) = find_inputs([tmp_path], 2, numbers=(2, 0))
    assert [p.name for p in one.paths] == ["a_0002.nii", "a_0000.nii"]  # in the order of the names given
    with pytest.raises(ValueError, match="2 files _0000 to _0001"):
        find_inputs([tmp_path], 2)
