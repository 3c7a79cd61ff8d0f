"""Prediction of structures that overlap, with channels missing, and where memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import medseg
from medseg import probability_maps
from medseg.batch import find_inputs, predict_files
from medseg.inference import SURE, Predictor
from medseg.io.dicom_write import write_series
from medseg.plan import ChannelPlan
from medseg.volume import LabelMap, Volume

CPU = torch.device("cpu")


class Overlapping(torch.nn.Module):
    """Logits by intensity: structure 1 is what is bright, structure 2 what is not dark; so 1 lies in 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([4 * (x[:, :1] - 1), 4 * (x[:, :1] + 0.2)], 1)


class Exclusive(torch.nn.Module):
    """Bright in the first channel is structure 1, bright in the second structure 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(x[:, :1], 1.0), 3 * x[:, :2]], 1)


def overlapping_plan(**changes: object) -> medseg.Plan:
    return tiny.plan().model_copy(update={"overlapping": True, **changes})


def by_hand(image: Volume) -> np.ndarray:
    """The image, normalised as planned; the grid of tests is that of the plan, so nothing is resampled."""
    values = np.asarray(image.array[0], np.float64)
    low, high = np.percentile(values, (0.5, 99.5))
    clipped = np.clip(values, low, high)
    return (clipped - clipped.mean()) / clipped.std()


# ---------------------------------------------------------------------------------------------------------------------
# Overlapping structures


def test_masks_and_probabilities_of_structures_that_overlap() -> None:
    predictor = Predictor(overlapping_plan(), Overlapping(), CPU)
    image, _ = tiny.case(0)  # its axes are those of the planned grid
    labels, soft = predictor.predict(image, probabilities=True)
    plain, nothing = predictor.predict(image)
    assert nothing is None and isinstance(soft, LabelMap)
    assert labels.is_layered and labels.array.dtype == bool and labels.geometry == soft.geometry == image.geometry
    assert labels.names == soft.names == {2: "bright", 5: "dark"}
    assert np.array_equal(plain.array, labels.array)
    x = by_hand(image)
    expected = 1 / (1 + np.exp(-4 * (x - 1))), 1 / (1 + np.exp(-4 * (x + 0.2)))
    np.testing.assert_allclose(soft.array, expected, atol=2e-2)
    assert (labels.mask(2) & labels.mask(5)).any() and not (labels.mask(2) & ~labels.mask(5)).any()
    refined, _ = predictor.predict(image, crf=medseg.CRFParameters())
    assert refined.is_layered and (refined.array == labels.array).mean() > 0.9


def test_blank_surroundings_hold_nothing() -> None:
    channels = (ChannelPlan(name="MR", scheme="zscore", masked=True),)
    predictor = Predictor(overlapping_plan(channels=channels), Overlapping(), CPU)
    image, _ = tiny.case(0)
    array = np.array(image.array)
    array[:, 8:] = array.min() - 50
    labels, soft = predictor.predict(replace(image, array=array), probabilities=True)
    assert soft is not None
    assert not labels.array[:, 11:].any()
    assert soft.array[:, 11:].max() <= 1 / (1 + np.exp(SURE)) + 1e-6


def test_files_of_structures_that_overlap(tmp_path: Path) -> None:
    """Every format gives the same masks back; --split gives one file each."""
    image, _ = tiny.case(50)
    write_series(image, tmp_path / "series", description="x", modality="MR")
    predictor = Predictor(overlapping_plan(), Overlapping(), CPU)
    inputs = find_inputs([tmp_path / "series"], 1)
    out = tmp_path / "out"
    done = predict_files(predictor, inputs, out, to=("nifti", "nrrd", "seg", "rtstruct"), probabilities=True)
    assert not done.failed
    names = [p.name.removeprefix("series") for p in done.written["series"]]
    assert names == [".nii.gz", ".nrrd", ".seg.dcm", ".rtstruct.dcm", "_probabilities.nii.gz"]
    scan = medseg.read(tmp_path / "series")
    expected = predictor.predict(scan)[0]
    assert (expected.mask(2) & expected.mask(5)).any()
    for path in done.written["series"]:
        found = medseg.read_labels(path, like=scan)
        for name in ("bright", "dark"):
            assert np.array_equal(found.mask(name), expected.mask(name)), path.name
    soft = medseg.read(done.written["series"][-1])  # as an image it still knows that no channel is the background
    assert probability_maps.overlap(soft)
    assert np.array_equal(probability_maps.labels_of(soft).array, expected.array)
    assert np.array_equal(probability_maps.layers_of(soft).array, soft.array)
    medseg.write(soft, tmp_path / "again.nii.gz")
    assert probability_maps.overlap(medseg.read(tmp_path / "again.nii.gz"))
    split = predict_files(predictor, inputs, tmp_path / "split", to=("nifti", "seg"), split=True)
    relative = [str(p.relative_to(tmp_path / "split")) for p in split.written["series"]]
    assert relative == ["series/2_bright.nii.gz", "series/5_dark.nii.gz", "series.seg.dcm"]
    for number, path in zip((2, 5), split.written["series"], strict=False):
        assert np.array_equal(medseg.read_labels(path).array, expected.mask(number))
    with pytest.raises(FileExistsError, match=r"2_bright"):
        predict_files(predictor, inputs, tmp_path / "split", split=True)


# ---------------------------------------------------------------------------------------------------------------------
# Channels


@pytest.fixture
def two() -> tuple[Predictor, Volume]:
    channels = tuple(ChannelPlan(name=name, scheme="zscore") for name in ("T1", "FLAIR"))
    image, _ = tiny.case(0)
    other, _ = tiny.case(4)
    plan = tiny.plan().model_copy(update={"channels": channels})
    return Predictor(plan, Exclusive(), CPU), replace(image, array=np.concatenate([image.array, other.array]))


def test_channels_are_found_by_name(two: tuple[Predictor, Volume]) -> None:
    predictor, image = two
    turned = replace(image, array=image.array[::-1])
    expected = predictor.predict(image)[0]
    assert {2, 5} <= set(np.unique(expected.array))
    found = predictor.predict(turned, channels=("FLAIR", "T1"))[0]
    assert np.array_equal(found.array, expected.array)


@pytest.mark.parametrize(("number", "name"), [(0, "T1"), (1, "FLAIR")])
def test_channel_that_is_missing_is_one_without_contrast(
    two: tuple[Predictor, Volume], number: int, name: str, tmp_path: Path
) -> None:
    """An even channel is zero after normalisation: a missing one must give the same."""
    predictor, image = two
    array = np.array(image.array)
    array[1 - number] = 7
    expected, _ = predictor.predict(replace(image, array=array))
    given = replace(image, array=image.array[number : number + 1])
    found, soft = predictor.predict(given, channels=(name,), probabilities=True)
    assert np.array_equal(found.array, expected.array)
    assert soft is not None and soft.channels == 3
    medseg.write(given, tmp_path / "in" / "one.nii.gz")
    done = predict_files(predictor, find_inputs([tmp_path / "in"], 1), tmp_path / "out", channels=(name,))
    assert np.array_equal(medseg.read_labels(done.written["one"][0]).array, expected.array)


def test_channels_that_do_not_fit(two: tuple[Predictor, Volume]) -> None:
    predictor, image = two
    one = replace(image, array=image.array[:1])
    with pytest.raises(ValueError, match=r"must have 2 channels as planned, got 1; .*--channels, of T1, FLAIR"):
        predictor.predict(one)
    for channels in (("T2",), ("T1", "T1"), ()):
        with pytest.raises(ValueError, match="channels must be among T1, FLAIR, each once, got"):
            predictor.predict(one, channels=channels)
    with pytest.raises(ValueError, match="image must have the channels T1, FLAIR, got 1 channels"):
        predictor.predict(one, channels=("T1", "FLAIR"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Hungry(torch.nn.Module):
    """Takes at most so many windows at a time."""

    def __init__(self, most: int, problem: Exception) -> None:
        super().__init__()
        self.most, self.problem = most, problem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise self.problem
        return torch.cat([torch.zeros_like(x), 4 * (x - 1.5), 4 * (-x - 1.5)], 1)


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("Unable to allocate 9 GiB for an array"),
    ],
)
def test_fewer_windows_where_memory_runs_out(problem: Exception, caplog: pytest.LogCaptureFixture) -> None:
    image, _ = tiny.case(1)
    plan = tiny.plan(dims=2)
    expected = Predictor(plan, Hungry(99, problem), CPU).predict(image)[0]
    assert not caplog.records
    found = Predictor(plan, Hungry(1, problem), CPU).predict(image)[0]
    assert np.array_equal(found.array, expected.array)
    assert "out of memory on cpu with 8 windows at a time; again with 1" in caplog.text
    words = r"must fit into the memory of cpu, got an image of .* 3 classes and one window of 16 x 16 at a time.*; crop"
    with pytest.raises(MemoryError, match=words):
        Predictor(plan, Hungry(0, problem), CPU).predict(image, probabilities=True)


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        Predictor(tiny.plan(), Hungry(0, RuntimeError("broken")), CPU).predict(tiny.case(1)[0])


def test_input_that_is_too_large_does_not_stop_the_others(tmp_path: Path) -> None:
    medseg.write(tiny.case(1)[0], tmp_path / "in" / "a.nii.gz")
    done = predict_files(
        Predictor(tiny.plan(), Hungry(0, MemoryError()), CPU), find_inputs([tmp_path / "in"], 1), tmp_path / "out"
    )
    assert "one window of 16 x 16 x 12" in done.failed["a"] and "a.nii.gz" in done.failed["a"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sums_on_the_cpu_give_the_same() -> None:
    image, _ = tiny.case(1)
    network = Hungry(9, RuntimeError())
    predictor = Predictor(tiny.plan(), network, torch.device("cuda"))
    array, _ = predictor._prepared(image, None)
    whole = []
    for where in ("cuda", "cpu"):
        slabs = predictor._slabs(array, 1, torch.device(where), None)
        whole.append(torch.cat([slab.logits.cpu().clone() for slab in slabs], 1))
    torch.testing.assert_close(*whole)
