"""What one pass over the cases finds, against what was put into them."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import geometries
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import medseg
from medseg import fingerprint as module
from medseg.cases import Case
from medseg.fingerprint import fingerprint
from medseg.volume import Geometry, LabelMap, Structure, Volume


def written(
    folder: Path, name: str, array: np.ndarray, labels: np.ndarray, geometry: Geometry, structures: tuple = ()
) -> Case:
    image, label = folder / f"{name}_image.nii.gz", folder / f"{name}_label.nii.gz"
    medseg.write(Volume(array, geometry), image, force=True)
    medseg.write(LabelMap(labels, geometry, structures), label, force=True)
    return Case(name, (image,), label, name)


@given(geometry=geometries(6, 12), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_counts_components_and_grid(geometry: Geometry, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Voxels by numpy, components by labelling each mask alone, shape and spacing along R, A, S by nearest world axis."""
    generator = np.random.default_rng(seed)
    labels = (generator.integers(0, 3, geometry.shape) * (generator.random(geometry.shape) < 0.3)).astype(np.uint8) * 7
    array = generator.integers(-900, 900, geometry.shape).astype(np.int16)
    case = written(tmp_path_factory.mktemp("set"), "a", array, labels, geometry)
    (look,) = fingerprint([case])
    values = [n for n in np.unique(labels) if n]
    assert look.counts == {n: np.sum(labels == n) for n in values}
    for n in values:
        pieces, count = ndimage.label(labels == n, np.ones((3, 3, 3)))
        sizes = [np.sum(pieces == i + 1) for i in range(count)]
        assert look.components[n] == (count, min(sizes), max(sizes))
    inside = array[labels > 0] if values else array.ravel()
    assert sorted(look.samples[0]) == sorted(inside)
    axis_of = [int(np.argmax(np.abs(geometry.direction[world]))) for world in range(3)]
    assert look.shape == tuple(geometry.shape[a] for a in axis_of)
    assert look.spacing == pytest.approx([geometry.spacing[a] for a in axis_of], rel=1e-5)
    assert look.integers and look.lowest == array.min()
    assert look.blank == pytest.approx(np.mean(array == array.min()))


def test_samples_stay_few_and_fair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten cases share the room; slabs are drawn from in proportion, so the sample's mean is the foreground's."""
    monkeypatch.setattr(module, "ALL_SAMPLES", 5000)
    monkeypatch.setattr(module, "BLOCK", 600)
    geometry = Geometry.from_parts((20, 30, 40), (1, 1.1, 2))
    array = np.broadcast_to(np.arange(40, dtype=np.int16), (20, 30, 40))
    labels = np.zeros((20, 30, 40), np.uint8)
    labels[2:18, :, 10:] = 1
    case = written(tmp_path, "a", array, labels, geometry)
    looks = fingerprint([case] * 10)
    assert all(490 <= look.samples.shape[1] <= 510 for look in looks)
    assert looks[0].samples.min() >= 10
    assert looks[0].samples.mean() == pytest.approx(24.5, abs=0.2)


def test_missing_channel_and_unknown_labels(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((9, 8, 7), (1, 1, 2))
    labels = np.zeros((9, 8, 7), np.uint8)
    labels[2:4] = 1
    case = written(tmp_path, "a", np.full((9, 8, 7), 50, np.int16), labels, geometry)
    partial = Case("b", (None, case.images[0]), case.label, "b", unknown=(2,))
    (look,) = fingerprint([partial])
    assert look.present == (False, True)
    assert look.unknown == (2,)
    assert (look.samples[1] == 50).all()
    assert look.lowest == 50


def test_layers_that_overlap(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((9, 8, 7), (1, 1, 2))
    layers = np.zeros((2, 9, 8, 7), bool)
    layers[0, :5], layers[1, 6:] = True, True
    structures = (Structure(3, "lung"), Structure(9, "tumour"))
    apart = written(tmp_path, "a", np.ones((9, 8, 7), np.int16), layers, geometry, structures)
    layers[1, 4:6] = True
    shared = written(tmp_path, "b", np.ones((9, 8, 7), np.int16), layers, geometry, structures)
    first, second = fingerprint([apart, shared])
    assert (first.overlapping, second.overlapping) == (False, True)
    assert second.counts == {3: 5 * 56, 9: 5 * 56}
    assert second.names == {3: "lung", 9: "tumour"}


def test_a_hundred_thousand_labels_are_refused_quickly(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((50, 50, 41), (1, 1, 2))
    case = written(tmp_path, "nuclei", np.ones(geometry.shape, np.int16), np.zeros(geometry.shape, np.uint8), geometry)
    assert case.label is not None
    labels = np.arange(50 * 50 * 41, dtype=np.int32).reshape(geometry.shape)
    nib.save(nib.Nifti1Image(labels, geometry.affine), case.label)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"at most 255 structures, got more in case nuclei; .* use --foreground"):
        fingerprint([case])
    assert time.process_time() - begin < 3
    (look,) = fingerprint([case], united=True)
    assert look.counts == {1: 50 * 50 * 41 - 1}


def test_first_wrong_case_ends_the_pass(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((9, 8, 7), (1, 1, 2))
    good = written(tmp_path, "a", np.ones((9, 8, 7), np.int16), np.ones((9, 8, 7), np.uint8), geometry)
    done: list[int] = []
    missing = Case("gone", (tmp_path / "gone.nii.gz",), None, "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        fingerprint([good, missing, *[good] * 500], progress=done.append)
    assert done == [1]
