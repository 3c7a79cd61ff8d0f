"""Metrics beside their peers: time and memory on a 6-class 512 x 512 x 256 pair, and agreement of definitions.

``python workflows/bench/metrics.py [FOLDER]``; FOLDER with ``labelsTr`` adds 50 pairs of small real label maps. Needs
medpy, surface-distance and SimpleITK beside MONAI; the rows of panoptica are left out where it is not installed. One CPU
thread; peers once, ours three times.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import SimpleITK as sitk
import surface_distance as deepmind
import torch
from _measure import Measurement, measure, show
from medpy.metric import binary as medpy
from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from medseg.case_scores import score_case
from medseg.io import read_labels
from medseg.lesions import components, match_lesions
from medseg.metrics import confusion, dice, overlap, structure_scores, surface_scores
from medseg.volume import Geometry, LabelMap

try:
    import panoptica
    from panoptica.metrics import MetricMode
except ModuleNotFoundError as error:
    if error.name != "panoptica":  # installed, yet broken
        raise
    panoptica = None

SPACING = (0.8, 0.8, 1.5)
ORGANS = (
    ((200, 250, 120), (90, 75, 45)),
    ((350, 200, 140), (45, 45, 50)),
    ((380, 350, 100), (30, 22, 32)),
    ((120, 380, 90), (22, 25, 70)),
    ((300, 400, 150), (20, 20, 70)),
)  # centre and radii in voxels
LABELS = list(range(1, len(ORGANS) + 1))
Pair = tuple[np.ndarray, np.ndarray]
T = TypeVar("T")


def pair() -> Pair:
    """Prediction and reference of five organs with wobbly borders."""
    rng = np.random.default_rng(0)
    maps = np.zeros((2, 512, 512, 256), np.uint8)
    for label, (centre, radii) in enumerate(ORGANS, 1):
        box = tuple(slice(max(0, c - r - 16), c + r + 16) for c, r in zip(centre, radii, strict=True))
        place = np.ogrid[box]
        reach = sum(((x - c) / r) ** 2 for x, c, r in zip(place, centre, radii, strict=True))
        for labels, rough in zip(maps, (0.16, 0.10), strict=True):
            coarse = rng.standard_normal([n // 8 + 2 for n in reach.shape])
            wobble = ndimage.zoom(coarse, 8, order=1)[tuple(slice(n) for n in reach.shape)]
            labels[box][reach + rough * wobble < 1] = label
    return maps[1], maps[0]


def small_pairs(folder: Path, count: int = 50) -> list[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """Real label maps beside copies whose border was moved at random."""
    rng = np.random.default_rng(0)
    pairs = []
    for path in sorted(p for p in (folder / "labelsTr").glob("*.nii.gz") if not p.name.startswith("."))[:count]:
        labels = read_labels(path)
        noise = ndimage.gaussian_filter(rng.standard_normal(labels.geometry.shape), 2)
        moved = np.where(noise > 0.05, np.roll(labels.array, 1, 0), labels.array)
        pairs.append((moved.astype(np.uint8), labels.array, labels.geometry.spacing))
    return pairs


def _masks(p: np.ndarray, r: np.ndarray) -> list[Pair]:
    return [(p == n, r == n) for n in LABELS if (p == n).any() and (r == n).any()]


def _tensors(p: np.ndarray, r: np.ndarray) -> list[torch.Tensor]:
    """One-hot (1, S, I, J, K) of both."""
    return [torch.stack([torch.as_tensor(a == n) for n in LABELS])[None].float() for a in (p, r)]


def _text(values: object) -> str:
    return " ".join(f"{float(v):.3f}" for v in np.ravel(np.asarray(values, float)))


def _sitk(p: np.ndarray, r: np.ndarray) -> str:
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(*(sitk.GetImageFromArray(a) for a in (r, p)))
    return _text([measures.GetDiceCoefficient(n) for n in LABELS])


def _sitk_hausdorff(p: np.ndarray, r: np.ndarray) -> str:
    images = [sitk.GetImageFromArray((a == 2).astype(np.uint8).T) for a in (p, r)]
    for image in images:
        image.SetSpacing(SPACING)
    distance = sitk.HausdorffDistanceImageFilter()
    distance.Execute(*images)
    return _text([distance.GetHausdorffDistance()])


def _deepmind(p: np.ndarray, r: np.ndarray) -> str:
    rows = []
    for a, b in _masks(p, r):
        d = deepmind.compute_surface_distances(b, a, SPACING)
        rows.append(deepmind.compute_robust_hausdorff(d, 95))
        deepmind.compute_surface_dice_at_tolerance(d, 1.0)
    return _text(rows)


def _all_at_once(definition: str) -> Callable[[np.ndarray, np.ndarray], str]:
    def run(p: np.ndarray, r: np.ndarray) -> str:
        rows = structure_scores(p, r, LABELS, SPACING, definition=definition)  # type: ignore[arg-type]
        return _text([row["hd95_mm"] for row in rows])

    return run


def _where_installed(rows: dict[str, T]) -> dict[str, T]:
    """The rows of panoptica, or none where it is not installed."""
    return {} if panoptica is None else rows


def _panoptica(p: np.ndarray, r: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    """HD95 of each label."""
    evaluator = panoptica.Panoptica_Evaluator(
        panoptica.InputType.MATCHED_INSTANCE,
        instance_metrics=[panoptica.Metric[name] for name in ("DSC", "IOU", "ASSD", "HD", "HD95")],
    )
    (found,) = evaluator.evaluate(p, r, voxelspacing=spacing, verbose=False).values()
    return [float(v) for v in found.get_list_metric(panoptica.Metric.HD95, MetricMode.ALL)]


def _surface_rows() -> dict[str, Callable[[np.ndarray, np.ndarray], str]]:
    def monai_hd(p: np.ndarray, r: np.ndarray) -> str:
        return _text(
            compute_hausdorff_distance(*_tensors(p, r), include_background=True, spacing=SPACING, percentile=95)
        )

    def monai_nsd(p: np.ndarray, r: np.ndarray) -> str:
        compute_surface_dice(*_tensors(p, r), [1.0] * len(LABELS), include_background=True, spacing=SPACING)
        return "NSD"

    return {
        "medseg, all metrics (voxel)": _all_at_once("voxel"),
        "medseg, all metrics (area)": _all_at_once("area"),
        "surface-distance: HD95, NSD": _deepmind,
        "MONAI: HD95": monai_hd,
        "MONAI: NSD": monai_nsd,
        "medpy: HD95 of one organ alone": lambda p, r: _text([medpy.hd95(p == 2, r == 2, SPACING)]),
        "SimpleITK: HD of one organ alone": _sitk_hausdorff,
    } | _where_installed({
        "panoptica: Dice, IoU, ASSD, HD, HD95": lambda p, r: _text(_panoptica(p, r, SPACING)),
    })  # fmt: skip


def _overlap_rows() -> dict[str, Callable[[np.ndarray, np.ndarray], str]]:
    def monai_dice(p: np.ndarray, r: np.ndarray) -> str:
        metric = DiceMetric(num_classes=len(LABELS) + 1, include_background=False, reduction="none")
        return _text(metric(*(torch.as_tensor(a)[None, None] for a in (p, r))))

    return {
        "medseg: counts of all classes": lambda p, r: _text(dice(overlap(p, r, LABELS))),
        "numpy bincount of all voxels": lambda p, r: str(np.bincount((p * np.uint8(6) + r).ravel(), minlength=36)[0]),
        "medpy: Dice": lambda p, r: _text([medpy.dc(p == n, r == n) for n in LABELS]),
        "SimpleITK: overlap measures": _sitk,
        "MONAI: Dice": monai_dice,
    }


def agreement() -> None:
    """Our definitions beside the packages that use them, on one pair of masks, and on instances."""
    rng = np.random.default_rng(1)
    field = ndimage.gaussian_filter(rng.standard_normal((40, 36, 20)), 3)
    a, b = field > 0, field + 0.03 * rng.standard_normal() + 0.3 * np.roll(field, 3, 1) > 0
    spacing = (0.7, 1.1, 2.5)
    ours = {d: surface_scores(a, b, spacing, definition=d) for d in ("voxel", "pooled", "area")}  # type: ignore[arg-type]
    tensors = [torch.as_tensor(m)[None, None].float() for m in (a, b)]
    d = deepmind.compute_surface_distances(b, a, spacing)
    options = {"include_background": True, "spacing": spacing}
    images = [sitk.GetImageFromArray(m.astype(np.uint8).T) for m in (a, b)]
    for image in images:
        image.SetSpacing(spacing)
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*images)
    hd95_of = compute_hausdorff_distance(*tensors, percentile=95, **options)
    nsd_of = compute_surface_dice(*tensors, [1.0], **options)
    rows = [
        ("HD, voxel", ours["voxel"].hd_mm, "SimpleITK", hausdorff.GetHausdorffDistance()),
        ("HD95, voxel", ours["voxel"].hd95_mm, "MONAI", float(hd95_of)),
        ("NSD at 1 mm, voxel", ours["voxel"].nsd, "MONAI", float(nsd_of)),
        ("HD95, pooled", ours["pooled"].hd95_mm, "medpy", medpy.hd95(a, b, spacing)),
        ("ASSD, pooled", ours["pooled"].assd_mm, "medpy", medpy.assd(a, b, spacing)),
        ("HD95, area", ours["area"].hd95_mm, "surface-distance", deepmind.compute_robust_hausdorff(d, 95)),
        ("NSD at 1 mm, area", ours["area"].nsd, "surface-distance", deepmind.compute_surface_dice_at_tolerance(d, 1.0)),
    ]
    if panoptica is not None:
        hd95 = _panoptica(a.view(np.uint8), b.view(np.uint8), spacing)[0]
        rows += [("HD95, pooled", ours["pooled"].hd95_mm, "panoptica", hd95), *_instance_agreement(field)]
    print("\n### Agreement\n\n| what | medseg | peer | value |\n| --- | --- | --- | --- |")
    for name, value, peer, other in rows:
        print(f"| {name} | {value:.5f} | {peer} | {other:.5f} |")


def _instance_agreement(field: np.ndarray) -> list[tuple[str, float, str, float]]:
    """Panoptic quality of instances that were moved or missed."""
    r = components(field > 0.6 * field.std())
    p = np.roll(np.where(r % 4 == 3, 0, r), 1, 0)
    evaluator = panoptica.Panoptica_Evaluator(
        panoptica.InputType.UNMATCHED_INSTANCE, instance_matcher=panoptica.NaiveThresholdMatching()
    )
    (theirs,) = evaluator.evaluate(p, r, verbose=False).values()
    pq = match_lesions(p, r, (0.7, 1.1, 2.5)).scores()
    return [(key.upper(), pq[key], "panoptica", getattr(theirs, key)) for key in ("sq", "rq", "pq")]


def _lesion_rows() -> dict[str, Callable[[np.ndarray, np.ndarray], str]]:
    """Components of all structures, matched by IoU."""

    def ours(p: np.ndarray, r: np.ndarray) -> str:
        grid = Geometry.from_parts(p.shape, SPACING)
        sides = (LabelMap(a, grid) for a in (p, r))
        return _text([row["pq"] for row in score_case("", *sides, surface=False, lesions=True)])

    def panoptic(p: np.ndarray, r: np.ndarray) -> str:
        values = []
        for n in LABELS:
            evaluator = panoptica.Panoptica_Evaluator(
                panoptica.InputType.SEMANTIC,
                panoptica.ConnectedComponentsInstanceApproximator(),
                panoptica.NaiveThresholdMatching(),
                instance_metrics=[panoptica.Metric.DSC, panoptica.Metric.IOU],
            )
            (found,) = evaluator.evaluate((p == n).view(np.uint8), (r == n).view(np.uint8), verbose=False).values()
            values.append(found.pq)
        return _text(values)

    return {"medseg: lesions, and overlap": ours} | _where_installed({"panoptica: PQ, Dice, IoU": panoptic})


def _many(score: Callable[[np.ndarray, np.ndarray, tuple[float, ...]], object]) -> Callable[[list], str]:
    def run(pairs: list) -> str:
        return _text([np.mean([value for one in pairs for value in np.ravel(score(*one))])])

    return run


def small(folder: Path) -> dict[str, Measurement]:
    """All metrics, and HD95 alone by the peers, of 50 small pairs."""
    rows: dict[str, Callable[[np.ndarray, np.ndarray, tuple[float, ...]], object]] = {
        "medseg, all metrics": lambda p, r, s: [x["hd95_mm"] for x in structure_scores(p, r, [1, 2], s)],
        "medseg, overlap alone": lambda p, r, s: confusion(p, r, [1, 2])[0, 0],
        "surface-distance: HD95": lambda p, r, s: [
            deepmind.compute_robust_hausdorff(deepmind.compute_surface_distances(r == n, p == n, s), 95) for n in (1, 2)
        ],
        "medpy: HD95": lambda p, r, s: [medpy.hd95(p == n, r == n, s) for n in (1, 2)],
        "MONAI: HD95": lambda p, r, s: compute_hausdorff_distance(
            *(torch.stack([torch.as_tensor(a == n) for n in (1, 2)])[None].float() for a in (p, r)),
            include_background=True, spacing=s, percentile=95,
        ),
    }  # fmt: skip
    rows |= _where_installed({"panoptica: Dice, IoU, ASSD, HD, HD95": _panoptica})
    pairs = small_pairs(folder)
    repeats = {name: 3 if name.startswith("medseg") else 1 for name in rows}
    return {n: measure(lambda score=score: _many(score)(pairs), repeats=repeats[n]) for n, score in rows.items()}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    if panoptica is None:
        print("panoptica is not installed: its rows are left out")
    agreement()
    tables = (
        ("Overlap, 6 classes, 512 x 512 x 256, one thread (note: Dice)", _overlap_rows()),
        ("Surface, 5 organs, 512 x 512 x 256, one thread (note: HD95, mm)", _surface_rows()),
        ("Lesions, 5 structures, 512 x 512 x 256, one thread (note: PQ)", _lesion_rows()),
    )
    maps = pair()
    for title, rows in tables:
        repeats = {name: 3 if name.startswith("medseg") else 1 for name in rows}
        measured = {name: measure(lambda run=run: run(*maps), repeats=repeats[name]) for name, run in rows.items()}
        show(title, measured, next(iter(rows)))
    if len(sys.argv) > 1:
        rows = small(Path(sys.argv[1]))
        show("50 small pairs, 2 structures, one thread (note: mean HD95, mm)", rows, next(iter(rows)))


if __name__ == "__main__":
    main()
