"""A structure followed from slice to slice: where it ends, who leads between two drawn slices, leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from promptable import Bright

from medseg.boxes import ellipse
from medseg.embeddings import EmbeddingCache
from medseg.planes import Planes
from medseg.propagation import Propagation, best_start, propagate, rectangle_of
from medseg.slice_model import SliceModel
from medseg.volume import Geometry, Volume
from medseg.windows import choose_window

GRID = Geometry.from_parts((50, 44, 20), (1.0, 1.2, 3.0))


def slices(voxels: np.ndarray, grid: Geometry = GRID) -> SliceModel:
    image = Volume(voxels.astype(np.int16), grid, {"modality": "CT"})
    planes, cache = Planes(grid, 2), EmbeddingCache(None, 1 << 26)
    return SliceModel(image, planes, Bright(), choose_window(image), cache, torch.device("cpu"))


def column(first: int, last: int, level: int = 120, beyond: int | None = None) -> np.ndarray:
    """A round column between two slices; what goes on beyond it has another brightness."""
    i, j = np.ogrid[:50, :44]
    disc = (i - 25) ** 2 + (j - 20) ** 2 < 100
    voxels = np.full(GRID.shape, -140, np.int16)
    for k in range(20):
        inside = first <= k <= last
        if inside or beyond is not None:
            voxels[..., k][disc] = level if inside else beyond
    return voxels


def seed(model: SliceModel, voxels: np.ndarray, k: int) -> np.ndarray:
    return model.planes.take(voxels > 0, k).copy()


def test_it_ends_where_the_tissue_changes() -> None:
    voxels = column(5, 13, beyond=20)  # the model itself would go on: it draws what is of one brightness in a box
    voxels[voxels == -140] = 20
    model = slices(voxels)
    start = {9: model.planes.take(voxels == 120, 9).copy()}
    assert sorted(propagate(model, start, limits=(0, 19))) == list(range(5, 14))
    endless = Propagation(end_score=-99, least_tissue=0, end_iou=0)
    assert sorted(propagate(model, start, limits=(0, 19), settings=endless)) == list(range(20))


def test_limits_and_boxes_in_space() -> None:
    model = slices(column(0, 19))
    start = {9: seed(model, column(0, 19), 9)}
    assert sorted(propagate(model, start, limits=(7, 12))) == [7, 8, 9, 10, 11, 12]
    within = rectangle_of(start[9])
    assert within is not None
    narrow = np.add(within, (4, 0, 0, 0))
    found = propagate(model, start, limits=(7, 12), within=narrow)
    assert all(rectangle_of(found[n])[0] >= narrow[0] for n in (7, 8, 10, 11, 12))  # type: ignore[index]


@pytest.mark.parametrize(("low", "high"), [(3, 10), (3, 11), (5, 6)])
def test_between_two_drawn_slices_each_leads_to_the_middle(low: int, high: int) -> None:
    """The left half is drawn below, the right half above: which slice follows which shows."""
    i = np.arange(50)[:, None, None]
    voxels = np.full(GRID.shape, -140, np.int16)
    voxels[10:25, 10:30], voxels[25:40, 10:30] = 60, 200
    model = slices(voxels)
    left = model.planes.take((voxels == 60) & (i < 25), low).copy()
    right = model.planes.take((voxels == 200) & (i >= 25), high).copy()
    found = propagate(model, {low: left, high: right}, limits=(low, high), settings=Propagation(margins=(1.0,)))
    assert sorted(found) == list(range(low, high + 1))
    middle = (low + high) / 2
    for n, mask in found.items():
        nearer = left if n <= middle else right
        assert (mask & nearer).sum() > 0.8 * mask.sum()


def test_an_empty_slice_ends_it_and_a_still_one_leads_nowhere() -> None:
    voxels = column(0, 19)
    model = slices(voxels)
    nothing = np.zeros(model.planes.size, bool)
    found = propagate(model, {9: seed(model, voxels, 9), 12: nothing}, limits=(6, 15))
    assert sorted(n for n, mask in found.items() if mask.any()) == [6, 7, 8, 9, 10, 11]
    alone = propagate(model, {9: seed(model, voxels, 9)}, limits=(6, 15), still={9})
    assert sorted(alone) == [9]
    assert propagate(model, {3: nothing}, limits=(0, 19)).keys() == {3}


def test_margins_are_millimetres_of_the_slice() -> None:
    assert Propagation(margins=(3.0, 6.0)).margins_px((1.5, 3.0)).tolist() == [[1, 2], [2, 4]]
    assert Propagation(margins=(2.0,), margin_units="px").margins_px((1.5, 3.0)).tolist() == [[2, 2]]
    for bad in ((), (-1.0,), (float("nan"),)):
        with pytest.raises(ValueError, match="margins must be"):
            Propagation(margins=bad)


def test_the_ellipse_fills_its_box() -> None:
    drawn = ellipse(np.array([10.0, 20, 69, 49]), (80, 100))
    assert drawn.sum() == pytest.approx(np.pi / 4 * 60 * 30, rel=0.01)
    assert rectangle_of(drawn).tolist() == [10, 20, 69, 49]  # type: ignore[union-attr]
    assert ellipse(np.array([3.0, 4, 3, 4]), (9, 9)).sum() == 1


def test_the_start_in_a_box_is_where_it_is_filled() -> None:
    i, j = np.ogrid[:50, :44]
    voxels = np.full(GRID.shape, -140, np.int16)
    for k in range(20):
        voxels[..., k][(i - 25) ** 2 + (j - 20) ** 2 < (4 + k) ** 2 / 2] = 120
    model = slices(voxels)
    within = rectangle_of(seed(model, voxels, 15))
    assert within is not None
    number, mask = best_start(model, 2, 16, within)
    assert number >= 12 and mask.any()


def test_progress_is_told() -> None:
    voxels, told = column(0, 19), []
    model = slices(voxels)
    propagate(model, {9: seed(model, voxels, 9)}, limits=(6, 15), progress=lambda done, most: told.append((done, most)))
    assert told == [(n, 10) for n in range(1, 10)]
