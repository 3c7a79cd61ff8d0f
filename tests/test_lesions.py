"""Lesions and instances against brute force; numbers of panoptica 2.2.6 on the same maps."""

from __future__ import annotations

from itertools import permutations

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.lesions import Lesions, components, detection, match_lesions, sensitivity_by_size

SPACING = (0.7, 1.3, 3.0)


def flood(mask: np.ndarray, connectivity: int) -> list[frozenset[tuple[int, ...]]]:
    """Connected components by walking from voxel to voxel."""
    left = {tuple(v) for v in np.argwhere(mask).tolist()}
    reach = {6: 1, 18: 2, 26: 3}[connectivity]
    steps = [s for s in np.ndindex(*(3,) * mask.ndim) if 0 < sum(abs(v - 1) for v in s) <= reach]
    found = []
    while left:
        part, front = set(), [left.pop()]
        while front:
            here = front.pop()
            part.add(here)
            for step in steps:
                there = tuple(h + v - 1 for h, v in zip(here, step, strict=True))
                if there in left:
                    left.remove(there)
                    front.append(there)
        found.append(frozenset(part))
    return found


def blobs(seed: int, shape=(9, 7, 5), threshold=0.4) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 0.8)
    return field > threshold * field.std() * 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([26, 18, 6]), st.sampled_from([(9, 7, 5), (11, 8), (9, 7, 1)]))
def test_components_are_those_of_a_walk(seed, connectivity, shape):
    mask = np.random.default_rng(seed).random(shape) < 0.3
    numbered = components(mask, connectivity)
    ours = {frozenset(map(tuple, np.argwhere(numbered == n).tolist())) for n in range(1, numbered.max() + 1)}
    assert ours == set(flood(mask, connectivity))


def best_sum(table: np.ndarray) -> float:
    """Largest sum of one entry per row and column, by trying all."""
    rows, columns = table.shape
    if rows > columns:
        return best_sum(table.T)
    return max((sum(table[r, c] for r, c in enumerate(p)) for p in permutations(range(columns), rows)), default=0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7]), st.sampled_from(["iou", "optimal", "overlap"])
)
def test_matching_is_that_of_brute_force(seed, least, rule):
    a, b = blobs(seed), blobs(seed) ^ (np.random.default_rng(seed + 1).random((9, 7, 5)) < 0.08)
    p, r = flood(a, 26), flood(b, 26)
    if len(p) > 6 or len(r) > 6:
        p, r = p[:6], r[:6]
        a, b = (np.zeros_like(a), np.zeros_like(b))
        for part, mask in ((p, a), (r, b)):
            for voxel in frozenset().union(*part):
                mask[voxel] = True
    table = np.array([[len(x & y) / len(x | y) for x in p] for y in r]).reshape(len(r), len(p))
    touch = table > 0
    kept = np.where(touch & (table >= least), table, 0.0)
    found = match_lesions(a, b, SPACING, Lesions(rule, least))
    score = found.scores()
    assert (score["lesions"], score["reference_lesions"]) == (len(p), len(r))
    assert found.voxel_mm3 == pytest.approx(0.7 * 1.3 * 3.0)
    if rule == "overlap":
        assert score["lesions_found"] == touch.any(axis=1).sum() if touch.size else True
        assert score["false_positives"] == (len(p) - touch.any(axis=0).sum() if touch.size else len(p))
        assert np.isnan(score["pq"])
        return
    ious = [pair.iou for pair in found.pairs]
    assert len({x.reference for x in found.pairs}) == len({x.prediction for x in found.pairs}) == len(ious)
    if rule == "optimal":
        assert sum(ious) == pytest.approx(best_sum(kept) if kept.size else 0)
    else:
        work, greedy = kept.copy(), []
        while work.size and work.max() > 0:
            row, column = np.unravel_index(work.argmax(), work.shape)
            greedy.append(work[row, column])
            work[row], work[:, column] = 0, 0
        assert sum(ious) == pytest.approx(sum(greedy)) or len(set(kept[kept > 0])) < (kept > 0).sum()
    tp = len(ious)
    if p or r:
        assert score["pq"] == pytest.approx(sum(ious) / (tp + (len(p) - tp) / 2 + (len(r) - tp) / 2))
        assert score["rq"] == pytest.approx(2 * tp / (len(p) + len(r)))


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Two reference lesions under one predicted (a merge), one under two (a split), one missed, one made up, one found."""
    p, r = np.zeros((2, 30, 12, 6), bool)
    r[1:4, 1:4, 1:3], r[6:9, 1:4, 1:3], p[1:9, 1:4, 1:3] = True, True, True
    r[12:20, 1:4, 1:3], p[12:15, 1:4, 1:3], p[17:20, 1:4, 1:3] = True, True, True
    r[24:26, 1:3, 4:6] = True
    p[24:26, 8:11, 4:6] = True
    r[1:7, 7:11, 3:6], p[1:7, 7:11, 3:6] = True, True
    return p, r


def test_merges_splits_misses_and_inventions_are_named():
    p, r = scene()
    found = match_lesions(p, r, SPACING)
    one = {key: components(m) for key, m in (("p", p), ("r", r))}
    merged, split = int(one["p"][4, 2, 1]), int(one["r"][15, 2, 1])
    assert found.merges == {merged: (int(one["r"][1, 1, 1]), int(one["r"][6, 1, 1]))}
    assert found.splits == {split: (int(one["p"][12, 1, 1]), int(one["p"][17, 1, 1]))}
    assert int(one["r"][24, 1, 4]) in found.missed
    assert int(one["p"][24, 8, 4]) in found.false_positives
    score = match_lesions(p, r, SPACING, Lesions("overlap")).scores()
    assert (score["lesions_found"], score["lesions_missed"], score["false_positives"]) == (4, 1, 1)
    assert (score["lesion_sensitivity"], score["lesion_precision"]) == (4 / 5, 4 / 5)


def test_sizes_are_in_mm3():
    p, r = scene()
    how = Lesions("overlap", sizes_mm3=(8 * 2.73, 100.0))
    rows = match_lesions(p, r, SPACING, how).by_size()
    # 8 voxels (on the limit), 18, 18, 48 and 72 voxels of 2.73 mm3
    assert [(x["reference_lesions"], x["lesions_found"]) for x in rows] == [(0, 0), (3, 2), (2, 2)]
    assert np.isnan(rows[0]["lesion_sensitivity"])
    assert rows[2]["to_mm3"] == np.inf
    both = [match_lesions(p, r, SPACING, how)] * 2
    assert sensitivity_by_size(both)[1]["reference_lesions"] == 6
    with pytest.raises(ValueError, match="matched in the same way"):
        sensitivity_by_size([both[0], match_lesions(p, r, SPACING)])


def test_the_undefined():
    empty, full = np.zeros((4, 5, 3), bool), np.ones((4, 5, 3), bool)
    none = match_lesions(empty, empty, SPACING).scores()
    assert all(np.isnan(none[k]) for k in ("lesion_f1", "pq", "rq", "sq", "lesion_sensitivity", "lesion_precision"))
    missed = match_lesions(empty, full, SPACING).scores()
    assert (missed["lesion_f1"], missed["pq"], missed["lesion_sensitivity"], missed["lesion_precision"]) == (0, 0, 0, 0)
    made_up = match_lesions(full, empty, SPACING).scores()
    assert (made_up["lesion_f1"], made_up["pq"], made_up["false_positives"]) == (0, 0, 1)
    assert np.isnan(made_up["lesion_sensitivity"])
    same = match_lesions(full, full, SPACING).scores()
    assert (same["pq"], same["lesion_f1"]) == (1, 1)


# IoU at least 0.5, the pair with the highest first, on ``instance_maps(seed, shape)``: TP, SQ, RQ of panoptica 2.2.6.
PANOPTICA = {
    (0, (40, 31)): (10, 0.7662435179794834, 0.8695652173913043),
    (1, (33, 52)): (9, 0.7886021146599176, 0.782608695652174),
    (2, (17, 22, 11)): (10, 0.622903132309306, 0.8695652173913043),
    (3, (24, 15, 12)): (6, 0.650640619853205, 0.5217391304347826),
}


def instance_maps(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Touching instances (nearest of some seeds, as far as a radius); the prediction has moved and lost seeds."""
    rng = np.random.default_rng(seed)
    seeds = rng.uniform(0, 1, (12, len(shape))) * shape
    maps = []
    for places in (seeds + rng.normal(0, 0.8, seeds.shape), seeds):
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
        distance = np.linalg.norm(grid[..., None, :] - places, axis=-1)
        numbers = distance.argmin(-1) + 1
        maps.append(np.where(distance.min(-1) < 4.5, numbers, 0).astype(np.uint16))
    p, r = maps
    p[p == 3] = 0
    p[p > 0] = p[p > 0] * 7 + 100
    return p, r


@pytest.mark.parametrize("key", sorted(PANOPTICA))
def test_panoptic_quality_is_that_of_panoptica(key):
    p, r = instance_maps(*key)
    tp, sq, rq = PANOPTICA[key]
    score = match_lesions(p, r, (1.0,) * p.ndim).scores()
    assert score["lesions_found"] == tp
    assert (score["sq"], score["rq"], score["pq"]) == pytest.approx((sq, rq, sq * rq), abs=1e-6)


def test_classes_together():
    p, r = instance_maps(0, (40, 31))
    classes = [match_lesions(np.where(p % 2 == n, p, 0), np.where(r % 2 == 1 - n, r, 0), (1.0, 1.0)) for n in (0, 1)]
    together, alone = detection(classes), [m.scores() for m in classes]
    assert together["lesions_found"] == sum(s["lesions_found"] for s in alone)
    ious = [pair.iou for m in classes for pair in m.pairs]
    assert together["pq"] == pytest.approx(2 * sum(ious) / (together["lesions"] + together["reference_lesions"]))


def test_inputs_are_checked():
    mask = np.zeros((3, 4, 5), bool)
    with pytest.raises(ValueError, match=r"must have one shape, got \(3, 4, 5\) and \(3, 4, 4\)"):
        match_lesions(mask, mask[..., 1:], SPACING)
    with pytest.raises(ValueError, match="spacing must be 3 positive"):
        match_lesions(mask, mask, (1, 0, 1))
    with pytest.raises(TypeError, match="prediction must be a mask of bool"):
        match_lesions(np.ones((3, 4, 5)), mask, SPACING)
    with pytest.raises(ValueError, match="must not be negative, got -1 in the reference"):
        match_lesions(mask, np.full((3, 4, 5), -1), SPACING)
    for wrong in ({"rule": "x"}, {"min_iou": 2}, {"connectivity": 8}, {"sizes_mm3": (5, 3)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Lesions(**wrong)
    with pytest.raises(ValueError, match="connectivity must be 26, 18 or 6"):
        components(mask, 4)


@pytest.mark.data
def test_real_lesions(data_dir):
    truth = np.asarray(nibabel.load(data_dir / "ms_lesions" / "patient07_lesions.nii.gz").dataobj) > 0
    counts = [len(match_lesions(truth, truth, (1, 1, 1), Lesions(connectivity=c)).reference) for c in (26, 18, 6)]
    assert counts == [37, 38, 49]
    numbered = components(truth)
    kept = np.isin(numbered, [n for n in range(1, 38) if n % 5])  # every fifth is missed
    kept[:6, :6, :6] = True  # and one is made up
    score = match_lesions(kept, truth, (1, 1, 1)).scores()
    assert (score["lesions_found"], score["lesions_missed"], score["false_positives"]) == (30, 7, 1)
    assert (score["lesion_sensitivity"], score["lesion_f1"]) == pytest.approx((30 / 37, 60 / 68))
    assert score["sq"] == 1
    by_size = match_lesions(kept, truth, (1, 1, 1)).by_size()
    assert sum(x["reference_lesions"] for x in by_size) == 37
