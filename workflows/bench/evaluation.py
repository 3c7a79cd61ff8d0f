"""Evaluation of many cases: memory beside the number of cases, and two threads over cases beside one.

``python workflows/bench/evaluation.py [CASES]``: CASES (1000) pairs of small label maps are written to a temporary folder
and evaluated with all metrics and lesions. Each row is measured in a process of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from _measure import Measurement, measure, show
from scipy import ndimage

import medseg
from medseg import evaluation

SHAPE, SPACING = (64, 56, 40), (0.9, 0.9, 2.0)
LARGER, LARGER_CASES = (192, 192, 96), 16
STRUCTURES = (medseg.Structure(1, "organ"), medseg.Structure(2, "lesions"))


def label_map(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """An organ with a wobbly border, and a few lesions inside it."""
    field = ndimage.zoom(rng.standard_normal([n // 8 + 2 for n in shape]), 8, order=1)[tuple(map(slice, shape))]
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    organ = (place**2).sum(0) < 0.45 + 0.08 * field
    return np.where(organ & (np.roll(field, 5, 1) > 1.0), 2, organ).astype(np.uint8)


def write_pairs(folder: Path, count: int, shape: tuple[int, int, int]) -> Path:
    """Predictions p and references r; the predictions are moved by a voxel or two."""
    rng = np.random.default_rng(0)
    grid = medseg.Geometry.from_parts(shape, SPACING)
    for n in range(count):
        array = label_map(rng, shape)
        for side, own in (("r", array), ("p", np.roll(array, 1 + n % 2, n % 3))):
            medseg.write(medseg.LabelMap(own, grid, STRUCTURES), folder / side / f"case{n:04d}.nii.gz")
    return folder


def evaluated(folder: Path, count: int, threads: int) -> str:
    """Mean Dice of the first cases."""
    evaluation.MOST_WORKERS = threads
    sides = ({f"{n:04d}": folder / side / f"case{n:04d}.nii.gz" for n in range(count)} for side in "pr")
    found = medseg.evaluate(*sides, lesions=True)
    return f"Dice {found.mean('dice'):.3f}, {len(found.rows)} rows, {len(found.lesions)} lesions"


def rows(folder: Path, counts: list[int], threads: list[int], repeats: int) -> dict[str, Measurement]:
    return {
        f"{count} cases, {n} thread{'s' * (n > 1)}": measure(
            lambda count=count, n=n: evaluated(folder, count, n), repeats=repeats
        )
        for count in counts
        for n in threads
    }


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        small = write_pairs(Path(name) / "small", count, SHAPE)
        counts = [max(1, count // 10), max(1, count // 2), count]
        found = rows(small, counts, [1], 1)
        show(f"Cohorts, {' x '.join(map(str, SHAPE))}, all metrics and lesions", found, next(iter(found)))
        large = write_pairs(Path(name) / "large", LARGER_CASES, LARGER)
        found = rows(large, [LARGER_CASES], [1, 2], 3)
        show(f"Threads, {' x '.join(map(str, LARGER))}, all metrics and lesions", found, next(iter(found)))


if __name__ == "__main__":
    main()
