"""Parts of the demo that need no training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import geometries
from hypothesis import given
from hypothesis import strategies as st

import medseg
from medseg.demo import BLOCKS, MADE, compare, half, require_replaceable, run_demo, template, write_blocks
from medseg.io.dicom_write import write_series
from medseg.resample import reorient
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume

OBLIQUE = Geometry.from_parts(
    (9, 11, 7), (0.9, 1.3, 2.5), (-31, 8, 52), np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
)


def image(geometry: Geometry = OBLIQUE) -> Volume:
    return Volume(np.random.default_rng(3).integers(0, 900, geometry.shape).astype(np.int16), geometry)


@given(geometries(), st.sampled_from(["RAS", "LPS", "SAL", "PIR"]))
def test_compare_finds_equal_voxels_in_any_order_of_axes(geometry: Geometry, orientation: str) -> None:
    written = image(geometry)
    assert compare(written, reorient(written, orientation)) < 1e-6


def test_compare_refuses_a_shift_and_a_changed_voxel(tmp_path: Path) -> None:
    written = image()
    write_series(written, tmp_path / "scan", description="x", modality="MR")
    found = medseg.read(tmp_path / "scan")
    assert compare(written, found) < 0.01
    affine = found.geometry.affine.copy()
    affine[1, 3] += 0.02
    with pytest.raises(GeometryError, match=r"corners up to 0.020 mm apart"):
        compare(written, replace(found, geometry=Geometry(found.geometry.shape, affine)))
    with pytest.raises(GeometryError, match="got shapes"):
        compare(written, half(found, (0, 5)))
    array = found.array.copy()
    array[0, 3, 4, 5] += 1
    with pytest.raises(ValueError, match="voxels read back"):
        compare(written, replace(found, array=array))


def test_half_and_blocks_keep_every_voxel_in_its_place(tmp_path: Path) -> None:
    volume = image()
    labels = LabelMap((volume.array[0] > 500).astype(np.uint8), OBLIQUE, (Structure(1, "grey matter"),))
    right = half(volume, (5, 9))
    np.testing.assert_array_equal(right.array, volume.array[:, 5:])
    np.testing.assert_allclose(right.geometry.to_world((0, 0, 0)), OBLIQUE.to_world((5, 0, 0)))
    write_blocks(volume, labels, tmp_path)
    dataset = medseg.load_dataset(tmp_path)
    assert [c.id for c in dataset.cases] == [f"block{n}" for n in range(BLOCKS)]
    pieces = []
    for case in dataset.cases:
        block, truth = medseg.read(case.images[0]), medseg.read_labels(case.label)
        start = OBLIQUE.to_index(block.geometry.to_world((0, 0, 0)))
        np.testing.assert_allclose(start, (0, sum(p.shape[2] for p in pieces), 0), atol=1e-4)
        np.testing.assert_array_equal(truth.array, block.array[0] > 500)
        assert truth.names == {1: "grey matter"}
        pieces.append(block.array)
    np.testing.assert_array_equal(np.concatenate(pieces, 2), volume.array)


def test_template_is_a_brain_with_two_tissues() -> None:
    pytest.importorskip("nilearn")
    volume, labels = template()
    assert volume.geometry == labels.geometry
    assert volume.modality == "MR"
    np.testing.assert_allclose(volume.geometry.spacing, 1)
    assert labels.names == {1: "grey matter", 2: "white matter"}
    litres = {n: float((labels.array == n).sum()) * 1e-6 for n in (1, 2)}
    assert 0.5 < litres[1] < 1.3  # an adult brain has about 0.7 to 0.9 l of grey and 0.4 to 0.6 l of white matter
    assert 0.3 < litres[2] < 0.8
    mean = {n: float(volume.array[0][labels.array == n].mean()) for n in (1, 2)}
    assert mean[2] > mean[1]  # as on every T1


def test_only_a_former_demo_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"new or a former demo, got .*thesis with other files"):
        run_demo(tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="must be a folder, got the file"):
        require_replaceable(tmp_path / "file", force=True)
    former = tmp_path / "former"
    for name in MADE:
        (former / name).mkdir(parents=True)
    assert require_replaceable(former, force=True) == former
    with pytest.raises(FileExistsError, match="must not exist yet"):
        require_replaceable(former, force=False)
    (tmp_path / "empty").mkdir()
    for free in (tmp_path / "empty", tmp_path / "new"):
        assert require_replaceable(free, force=True) == free
