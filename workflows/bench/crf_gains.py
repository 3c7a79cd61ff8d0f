"""What the dense CRF gains on real predictions, with settings chosen on other patients.

    python workflows/bench/crf_gains.py --data DATA --out DIR [--tasks scribbles-heart,scribbles-nuclei,...] [--cases 40]

DATA holds sunnybrook (cardiac MR), dsb2018 (nuclei) and hippocampus. Tasks, every model anew and on cases it never saw:

- scribbles-heart, scribbles-nuclei: a random forest on Gaussian features of one image learns from a scribble inside and
  one outside (drawn by rule from the reference) and gives the probabilities of that image, as ilastik does.
- sam-heart: LiteMedSAM with a box around the cavity; its decoder's masks of 64 x 64 enlarged bilinearly.
- unet-heart: a 2D U-Net on images of a quarter of the resolution, 180 steps on 20 slices of 8 patients; logits enlarged.
- unet-heart-nearest: the same, enlarged without interpolation.
- unet-hippocampus: a 3D U-Net at 2 mm, 180 steps on 8 cases, put back onto 1 mm.

Patients are split into two halves; for each half the settings (or none) of the highest mean Dice on the other half are
taken, so that every case is scored with settings that it had no part in. The table gives means before and after and the
change with its 95 % interval, by bootstrap over patients. ``verdict`` is what ``medseg refine --fit`` decides on all of
them. Predictions are kept in DIR and not made again. ``DIR/<task>.png``: the case of the median change, before, after
and reference.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier

import medseg
from medseg.crf_choice import choose
from medseg.crf_fit import Observed, Searched, decided, search
from medseg.models.sam import load_promptable

RESAMPLES = 2000
METRICS = ("dice", "iou", "hd95_mm")


@dataclass(frozen=True)
class Row:
    """One case as the CSV of a data set lists it."""

    case: str
    image: Path
    label: Path
    patient: str


def main() -> None:
    """Make the predictions that are missing, search, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--cases", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    print(
        "| task | n (patients) | Dice | IoU | HD95 | settings of either half | verdict |\n|" + " --- |" * 7, flush=True
    )
    for name in given.tasks.split(","):
        rows = TASKS[name](given.data, given.out / name, given.cases)
        print(line(name, given.out, rows), flush=True)


# -- search and scores ------------------------------------------------------------------------------------------------


def line(name: str, out: Path, rows: Sequence[Row]) -> str:
    """The row of a task in the table, and its picture."""
    begun = time.process_time()
    cases = [observed(row, out / name) for row in rows]
    structures = decided(cases[0].probabilities).structures
    found = search(cases, structures, device="cpu")
    half = np.array([sorted(set(found.patients)).index(p) % 2 for p in found.patients])
    chosen = {h: best_of(found, half != h) for h in (0, 1)}
    before, after = {}, {}
    for row, one, h in zip(rows, cases, half, strict=True):
        settings = chosen[int(h)]
        before[row.case] = one.decide(one.probabilities)
        after[row.case] = one.decide(one.refined(settings, "cpu")) if settings else before[row.case]
    references = {row.case: reference_of(one, structures) for row, one in zip(rows, cases, strict=True)}
    sides = [medseg.evaluate(side, references) for side in (before, after)]
    scores = {m: [values(side, m) for side in sides] for m in METRICS}
    patient = {row.case: row.patient for row in rows}
    cells = [cell(*scores[m], patient, 3 if m != "hd95_mm" else 2) for m in METRICS]
    choice = found.choice()
    (out / f"{name}.json").write_text(
        json.dumps({
            "choice": json.loads(choice.model_dump_json()), "halves": {h: words(s) for h, s in chosen.items()},
            "cases": {c: [[m[0].get(c), m[1].get(c)] for m in scores.values()] for c in patient},
            "cpu_s": time.process_time() - begun,
        }, indent=1)
    )  # fmt: skip
    change = {c: scores["dice"][1][c] - scores["dice"][0][c] for c in scores["dice"][0]}
    typical = sorted(change, key=lambda c: change[c])[len(change) // 2]
    at = [row.case for row in rows].index(typical)
    picture(out / f"{name}.png", cases[at].image, before[typical], after[typical], references[typical])
    verdict = "used" if choice.parameters else "not used"
    halves = "; ".join(words(chosen[h]) for h in (0, 1))
    return f"| {name} | {len(rows)} ({len(set(patient.values()))}) | {' | '.join(cells)} | {halves} | {verdict} |"


def best_of(found: Searched, part: np.ndarray) -> medseg.CRFParameters | None:
    """The settings of the highest mean Dice on a part of the cases, or None."""
    patients = [p for p, own in zip(found.patients, part, strict=True) if own]
    best = choose(found.dice[part], patients, found.settings, found.structures).best
    return None if best is None else medseg.CRFParameters(**{**best, "iterations": int(best["iterations"])})  # type: ignore[arg-type]


def observed(row: Row, folder: Path) -> Observed:
    """A case with the probabilities that were kept."""
    image = medseg.read(row.image)
    soft = medseg.read(folder / "probabilities" / f"{row.case}_probabilities.nii.gz")
    reference = medseg.read_labels(row.label)
    masks = {s.number: reference.array == s.number for s in decided(soft).structures}
    return Observed(row.patient, image, soft, decided, masks)


def reference_of(one: Observed, structures: Sequence[medseg.Structure]) -> medseg.LabelMap:
    """The reference in the structures of the prediction."""
    labels = np.zeros(one.image.geometry.shape, np.uint8)
    for s in structures:
        labels[one.references[s.number]] = s.number
    return medseg.LabelMap(labels, one.image.geometry, tuple(structures))


def values(side: medseg.evaluation.Evaluation, metric: str) -> dict[str, float]:
    """Mean over structures of a metric, by case where it is defined."""
    found: dict[str, list[float]] = {}
    for row in side.rows:
        if np.isfinite(row[metric]):
            found.setdefault(row["case"], []).append(row[metric])
    return {case: float(np.mean(v)) for case, v in found.items()}


def cell(before: dict[str, float], after: dict[str, float], patient: dict[str, str], digits: int) -> str:
    """Means before and after, and the change with its interval over patients."""
    cases = sorted(before.keys() & after.keys())
    change = np.array([after[c] - before[c] for c in cases])
    of = np.unique([patient[c] for c in cases], return_inverse=True)[1]
    sums, counts = np.bincount(of, change), np.bincount(of)
    draws = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), (2.5, 97.5))
    d = digits
    means = [np.mean([side[c] for c in cases]) for side in (before, after)]
    return f"{means[0]:.{d}f} to {means[1]:.{d}f} ({change.mean():+.{d}f}, {low:+.{d}f} to {high:+.{d}f})"


def words(settings: medseg.CRFParameters | None) -> str:
    """Settings in short: smoothing weight, and reach, share and weight of the bilateral kernel."""
    if settings is None:
        return "none"
    p = asdict(settings)
    return (
        f"{p['gaussian_weight']:g} / {p['bilateral_sigma_mm']:g} mm, {p['bilateral_sigma_share']:g}, "
        f"{p['bilateral_weight']:g}"
    )


def picture(
    path: Path, image: medseg.Volume, before: medseg.LabelMap, after: medseg.LabelMap, reference: medseg.LabelMap
) -> None:
    """The slice with most of the reference: before, after, reference as outlines."""
    k = int(np.count_nonzero(reference.array, axis=(0, 1)).argmax())
    grey = np.asarray(image.array)[:, :, :, k].mean(0).T
    places = np.argwhere(reference.array[:, :, k] > 0)
    (i0, j0), (i1, j1) = np.maximum(places.min(0) - 25, 0), np.minimum(places.max(0) + 25, grey.T.shape)
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (title, labels) in zip(
        axes, {"before": before, "after the CRF": after, "reference": reference}.items(), strict=True
    ):
        axis.imshow(grey, "gray", interpolation="nearest")
        for s in labels.structures:
            axis.contour(labels.mask(s.number)[:, :, k].T, [0.5], colors=[np.array(s.color) / 255], linewidths=1.5)
        axis.set(xlim=(i0, i1), ylim=(j1, j0), title=title)
        axis.axis("off")
    figure.savefig(path, dpi=110)


# -- data -------------------------------------------------------------------------------------------------------------


def heart(data: Path) -> list[Row]:
    """Slices of cardiac MR."""
    return [
        Row(p.name.split(".")[0], p, data / "sunnybrook/Labels" / p.relative_to(data / "sunnybrook/Images"),
            p.stem.split("-IM-")[0])
        for p in sorted((data / "sunnybrook/Images").rglob("*.png"))
    ]  # fmt: skip


def nuclei(data: Path, out: Path) -> list[Row]:
    """Grey pictures of nuclei up to 520 pixels wide; all nuclei are one structure."""
    rows = []
    for path in sorted((data / "dsb2018/images").glob("*.png")):
        label = out / "labels" / path.name
        if max(Image.open(path).size) > 520 or medseg.read(path).channels > 1:
            continue
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(Image.open(data / "dsb2018/labels" / path.name)) > 0).astype(np.uint8)).save(label)
        rows.append(Row(path.stem, path, label, path.stem))
    return rows


def hippocampi(data: Path) -> list[Row]:
    """Volumes of brain MR around the hippocampus."""
    return [
        Row(p.name.removesuffix(".nii.gz"), p, data / "hippocampus/labelsTr" / p.name, p.name)
        for p in sorted((data / "hippocampus/imagesTr").glob("hippocampus_*.nii.gz"))
    ]


def parted(rows: Sequence[Row], patients: int, train: int, test: int) -> tuple[list[Row], list[Row]]:
    """Cases of the first few patients to train on, and cases of the others; drawn at random."""
    order = np.random.default_rng(7).permutation(sorted({r.patient for r in rows})).tolist()
    draw = np.random.default_rng(3).permutation
    own, others = ([r for r in rows if (r.patient in order[:patients]) == side] for side in (True, False))
    return [own[i] for i in draw(len(own))[:train]], [others[i] for i in draw(len(others))[:test]]


def kept(rows: Sequence[Row], out: Path, predict: Callable[[Row], np.ndarray]) -> Sequence[Row]:
    """Write the probability (I, J, K) of the structure of each case, where it is not there yet."""
    for row in rows:
        path = out / "probabilities" / f"{row.case}_probabilities.nii.gz"
        if path.is_file():
            continue
        image, labels = medseg.read(row.image), medseg.read_labels(row.label)
        p = predict(row).astype(np.float32)
        meta = {"structures": (labels.structures or (medseg.Structure(1, "structure"),))[:1]}
        medseg.write(medseg.Volume(np.stack([1 - p, p]), image.geometry, meta), path)
    return rows


# -- tasks ------------------------------------------------------------------------------------------------------------


def scribbles(rows: Sequence[Row], out: Path) -> Sequence[Row]:
    """Probabilities of a pixel classifier taught with two scribbles on the same image."""

    def predict(row: Row) -> np.ndarray:
        grey = np.asarray(medseg.read(row.image).array, np.float32)[0, :, :, 0]
        mask = np.asarray(medseg.read_labels(row.label).array)[:, :, 0] > 0
        inside, outside = scribble(mask), scribble(~ndimage.binary_dilation(mask, iterations=4))
        features = [grey, *(ndimage.gaussian_filter(grey, s) for s in (1, 2, 4, 8))]
        features += [ndimage.gaussian_gradient_magnitude(grey, s) for s in (1, 2, 4)]
        x = np.stack(features, -1)
        forest = RandomForestClassifier(50, min_samples_leaf=3, random_state=0)
        forest.fit(np.concatenate([x[inside], x[outside]]), np.repeat([0, 1], [inside.sum(), outside.sum()]) == 0)
        return forest.predict_proba(x.reshape(-1, x.shape[-1]))[:, 1].reshape(*grey.shape, 1)

    return kept(rows, out, predict)


def scribble(mask: np.ndarray) -> np.ndarray:
    """One stroke: the middle of every column of pixels that meets the mask deep inside, two pixels wide."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    deep = depth >= 0.5 * np.percentile(depth[mask], 95)
    stroke = np.zeros_like(mask)
    for i in np.flatnonzero(deep.any(1)):
        found = np.flatnonzero(deep[i])
        stroke[i, found[len(found) // 2]] = True
    return ndimage.binary_dilation(stroke) & mask


def scribbles_heart(data: Path, out: Path, count: int) -> Sequence[Row]:
    """Slices with a cavity of at least 200 pixels."""
    return scribbles(with_cavity(data, count), out)


def with_cavity(data: Path, count: int) -> list[Row]:
    """Slices, of as many patients as there are, with a cavity of at least 200 pixels."""
    rows = parted(heart(data), 0, 0, 526)[1]
    return [r for r in rows if (np.asarray(Image.open(r.label)) > 0).sum() >= 200][:count]


def scribbles_nuclei(data: Path, out: Path, count: int) -> Sequence[Row]:
    """Pictures of nuclei."""
    return scribbles(parted(nuclei(data, out), 0, 0, count)[1], out)


def sam_heart(data: Path, out: Path, count: int) -> Sequence[Row]:
    """LiteMedSAM with a box 3 pixels wider than the cavity on each side."""
    model = load_promptable("lite-medsam")

    @torch.no_grad()
    def predict(row: Row) -> np.ndarray:
        grey = np.asarray(medseg.read(row.image).array, np.float32)[0, :, :, 0].T
        mask = np.asarray(medseg.read_labels(row.label).array)[:, :, 0].T > 0
        image = torch.as_tensor((grey - grey.min()) / np.ptp(grey)).expand(1, 3, *grey.shape)
        rows_, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0] - 3.0, rows_[0] - 3.0, columns[-1] + 3.0, rows_[-1] + 3.0]
        logits, _ = model.decode(model.encode(image), torch.tensor([0]), grey.shape, boxes=torch.tensor([box]))
        return np.asarray(logits[0, 0].sigmoid().T)[:, :, None]

    return kept(with_cavity(data, count), out, predict)


def unet(
    rows: Sequence[Row], out: Path, patients: int, train: int, count: int, mm: tuple[float, float, float]
) -> list[Row]:
    """Held-out cases predicted by a small U-Net trained for 180 steps at a coarse spacing."""
    few, others = parted(rows, patients, train, count)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "run" / "metrics.json").is_file():
        with (out / "train.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("case", "image", "label", "group"))
            writer.writerows((r.case, r.image.resolve(), r.label.resolve(), r.patient) for r in few)
        plan = medseg.make_plan(medseg.load_dataset(out / "train.csv"), spacing=mm, minutes=1)
        narrow = tuple(max(8, f // 2) for f in plan.features)
        plan = plan.model_copy(update={"features": narrow, "batch": 6 if plan.dims == 2 else 2})
        config = medseg.TrainConfig(
            dataset=out / "train.csv", out=out / "run", epochs=9, fold="none", device="cpu", force=True
        )
        medseg.train(config, plan)
    predictor = medseg.Predictor.load(out / "run", "cpu")
    for row in others:
        path = out / "probabilities" / f"{row.case}_probabilities.nii.gz"
        if not path.is_file():
            soft = predictor.predict(medseg.read(row.image), probabilities=True)[1]
            if soft is not None:
                medseg.write(soft, path)
    return others


def unet_heart(data: Path, out: Path, count: int) -> Sequence[Row]:
    """A quarter of the resolution, logits enlarged linearly."""
    return unet(heart(data), out, 8, 20, count, (4.0, 4.0, 1.0))


def unet_heart_nearest(data: Path, out: Path, count: int) -> Sequence[Row]:
    """The probabilities of ``unet_heart`` at its own resolution, every pixel enlarged to 4 x 4."""
    source = out.parent / "unet-heart"
    rows = unet_heart(data, source, count)

    def predict(row: Row) -> np.ndarray:
        p = np.asarray(medseg.read(source / "probabilities" / f"{row.case}_probabilities.nii.gz").array)[1]
        middle = (p[1::4] + p[2::4]) / 2  # the two pixels about the centre of each block
        return np.kron((middle[:, 1::4] + middle[:, 2::4]) / 2, np.ones((4, 4, 1)))

    return kept(rows, out, predict)


def unet_hippocampus(data: Path, out: Path, count: int) -> Sequence[Row]:
    """2 mm, in 3D."""
    return unet(hippocampi(data), out, 8, 8, count, (2.0, 2.0, 2.0))


TASKS: dict[str, Callable[[Path, Path, int], Sequence[Row]]] = {
    "scribbles-heart": scribbles_heart,
    "scribbles-nuclei": scribbles_nuclei,
    "sam-heart": sam_heart,
    "unet-heart": unet_heart,
    "unet-heart-nearest": unet_heart_nearest,
    "unet-hippocampus": unet_hippocampus,
}

if __name__ == "__main__":
    main()
