"""What starting from other weights gains, for 5, 10 and 20 labelled cases and the same minutes.

    python workflows/bench/transfer.py --data DATA --out DIR [--minutes 2] [--counts 5,10,20]
        [--seeds 1] [--tasks kvasir,hippocampus] [--methods all]

Tasks (DATA holds the folders named):

- kvasir: polyps in colour pictures (2D). From scratch: the planned U-Net, and a U-Net with EfficientNet-Lite0 as encoder;
  against the latter, and DeepLabV3+, starting from ImageNet, the encoder frozen or not.
- sunnybrook: the same on cardiac MR (grey); cases are slices of different patients, others than those held out.
- hippocampus: anterior and posterior part (3D). The planned U-Net from scratch against one that starts from a run on 70
  other cases whose two parts are one structure, as coarser labels of an older project would be. The minutes of that run
  (the same number) come on top, as ImageNet's training does.

Every run gets the same labelled cases, the same minutes (reading, planning and validations included) and the same held-out
cases, which no run trains on; they also choose its best weights, for all methods alike. Cases are drawn anew for each
seed. The table gives the mean Dice of the held-out cases and, paired by case against the first method of the task, the
mean gain with its 95 % bootstrap interval (seeds of one case averaged first). A run that is done is not done again; one
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import medseg

SOURCE_CASES = 80  # of the run that others start from
SOURCE_VALIDATION = 10  # of these, which choose its best weights
BOOTSTRAPS = 2000
FIRST = "scratch,scratch-lite0,imagenet-lite0,coarse-labels"  # half an hour with the defaults


@dataclass(frozen=True)
class Row:
    """One case as the CSV of a data set lists it."""

    case: str
    image: Path
    label: Path
    patient: str


@dataclass(frozen=True)
class Method:
    """How a network starts; ``init`` "source" is the run on other labels."""

    name: str
    model: str
    init: str | None = None
    freeze: bool = False


@dataclass(frozen=True)
class Task:
    """Cases to draw from, cases held out, and the methods; the first is what the others are compared with."""

    pool: Sequence[Row]
    held_out: Sequence[Row]
    methods: Sequence[Method]
    source: Sequence[Row] = ()


IMAGE_METHODS = (
    Method("scratch", "unet2d"),
    Method("scratch-lite0", "unet2d-encoder"),
    Method("imagenet-lite0", "unet2d-encoder", "imagenet"),
    Method("imagenet-lite0-frozen", "unet2d-encoder", "imagenet", freeze=True),
    Method("imagenet-deeplab", "deeplabv3plus", "imagenet"),
)
VOLUME_METHODS = (
    Method("scratch", "unet3d"),
    Method("coarse-labels", "unet3d", "source"),
    Method("coarse-labels-frozen", "unet3d", "source", freeze=True),
)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="kvasir,hippocampus")
    parser.add_argument("--methods", default=FIRST, help="names, or all")
    parser.add_argument("--counts", default="5,10,20")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=40)
    given = parser.parse_args()
    wanted = given.methods.split(",")
    lines = []
    for name in given.tasks.split(","):
        out = given.out / name
        task = TASKS[name](given.data / name, out, given.held_out)
        methods = [m for m in task.methods if given.methods == "all" or m.name in wanted]
        for seed in range(given.seeds):
            for count in map(int, given.counts.split(",")):
                for method in methods:
                    run(task, method, out, count, seed, given.minutes)
        lines += table(name, out, methods, given.minutes)
    (given.out / "transfer.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def run(task: Task, method: Method, out: Path, count: int, seed: int, minutes: float) -> None:
    """Train once and write the Dice of each held-out case; nothing where that is there."""
    folder = out / f"{minutes:g}min-{count:02d}-{method.name}-seed{seed}"
    if (folder / "dice.json").is_file():
        return
    init = method.init
    if init == "source":
        training, validation = task.source[SOURCE_VALIDATION:], task.source[:SOURCE_VALIDATION]
        source = out / f"source-{minutes:g}min"
        init = str(train(training, validation, source, Method("source", method.model), minutes))
    drawn = _draw(task.pool, count, seed)
    started = Method(method.name, method.model, init, method.freeze)
    path = train(drawn, task.held_out, folder / "run", started, minutes, seed)
    rows = medseg.Run.open(path).evaluation().rows
    dice: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        dice[row["case"]].append(row["dice"])
    means = {case: float(np.nanmean(values)) for case, values in dice.items() if np.isfinite(values).any()}
    (folder / "dice.json").write_text(json.dumps(means))
    shutil.rmtree(path)


def _draw(pool: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Cases of different patients, as long as there are patients."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for i in np.random.default_rng(seed).permutation(len(pool)):
        turns.append((seen[pool[i].patient], len(turns), pool[i]))
        seen[pool[i].patient] += 1
    return [row for _, _, row in sorted(turns, key=lambda t: t[:2])[:count]]


def train(
    cases: Sequence[Row], held_out: Sequence[Row], out: Path, method: Method, minutes: float, seed: int = 0
) -> Path:
    """A finished run on cases, validated on the held-out ones."""
    if (out / "metrics.json").is_file():
        return out
    listing = out.parent / f"{out.name}.csv"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "image", "label", "group"))
        for group, rows in (("labelled", cases), ("held out", held_out)):
            writer.writerows((r.case, r.image.resolve(), r.label.resolve(), group) for r in rows)
    folds = medseg.data.folds(medseg.load_dataset(listing).cases, 2)
    fold = next(i for i, (_, validation) in enumerate(folds) if validation[0].group == "held out")
    begun = (out / "plan.json").is_file()
    medseg.train(
        medseg.TrainConfig(
            dataset=listing, out=out, model=method.model, init=method.init, freeze=method.freeze, minutes=minutes,
            folds=2, fold=fold, seed=seed, resume=begun, device="cpu",
        )
    )  # fmt: skip
    return out


def table(task: str, out: Path, methods: Sequence[Method], minutes: float) -> list[str]:
    """Lines of Markdown: mean Dice, and gain over the first method with its interval, by number of cases."""
    found: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(out.glob(f"{minutes:g}min-*/dice.json")):
        match = re.fullmatch(r".*min-(\d+)-(.*)-seed\d+", path.parent.name)
        if match:
            for case, dice in json.loads(path.read_text()).items():
                found[int(match[1]), match[2]][case].append(dice)
    counts = sorted({count for count, _ in found})
    lines = [
        f"{task}, {minutes:g} minutes a run: mean Dice (gain over {methods[0].name}, 95 % interval)",
        "",
        "| method | " + " | ".join(f"{n} cases" for n in counts) + " |",
        "| --- |" + " --- |" * len(counts),
    ]
    for method in methods:
        cells = []
        for count in counts:
            own, base = found.get((count, method.name)), found.get((count, methods[0].name))
            cells.append("-" if not own else _cell(own, None if method is methods[0] else base))
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(own: Mapping[str, list[float]], base: Mapping[str, list[float]] | None) -> str:
    text = f"{np.mean([np.mean(v) for v in own.values()]):.3f}"
    if not base:
        return text
    gains = np.array([np.mean(own[case]) - np.mean(base[case]) for case in sorted(own.keys() & base.keys())])
    draws = np.random.default_rng(0).integers(len(gains), size=(BOOTSTRAPS, len(gains)))
    low, high = np.percentile(gains[draws].mean(1), (2.5, 97.5))
    return f"{text} ({gains.mean():+.3f}, {low:+.3f} to {high:+.3f})"


# -- tasks ------------------------------------------------------------------------------------------------------------


def kvasir(data: Path, out: Path, held_out: int) -> Task:
    """Pictures of polyps; the masks are JPEG, thresholded at 128."""
    rows = []
    for image in sorted((data / "images").glob("*.jpg")):
        label = _written(
            out / "labels" / f"{image.stem}.png", lambda path, i=image: _threshold(data / "masks" / i.name, path)
        )
        rows.append(Row(image.stem, image, label, image.stem))
    return _split(rows, held_out, IMAGE_METHODS)


def sunnybrook(data: Path, out: Path, held_out: int) -> Task:
    """Slices of cardiac MR, by patient."""
    rows = []
    for image in sorted((data / "Images").rglob("*.png")):
        label = data / "Labels" / image.relative_to(data / "Images")
        rows.append(Row(image.stem, image, label, image.stem.split("-IM-")[0]))
    return _split(rows, held_out, IMAGE_METHODS)


def hippocampus(data: Path, out: Path, held_out: int) -> Task:
    """Volumes, and for other cases the two parts as one structure."""
    rows = [
        Row(p.name.removesuffix(".nii.gz"), p, data / "labelsTr" / p.name, p.name)
        for p in sorted((data / "imagesTr").glob("hippocampus_*.nii.gz"))
    ]
    task = _split(rows, held_out, VOLUME_METHODS)
    others = [
        Row(
            r.case, r.image, _written(out / "labels" / r.label.name, lambda path, r=r: _merge(r.label, path)), r.patient
        )
        for r in task.pool[:SOURCE_CASES]
    ]
    return Task(task.pool[SOURCE_CASES:], task.held_out, task.methods, others)


TASKS: dict[str, Callable[[Path, Path, int], Task]] = {
    "kvasir": kvasir,
    "sunnybrook": sunnybrook,
    "hippocampus": hippocampus,
}


def _split(rows: Sequence[Row], held_out: int, methods: Sequence[Method]) -> Task:
    """Hold out the cases of randomly chosen patients, at most as many as asked for."""
    patients = sorted({r.patient for r in rows})
    order = np.random.default_rng(12345).permutation(patients)
    chosen: set[str] = set()
    for patient in order:
        if sum(r.patient in chosen for r in rows) < held_out:
            chosen.add(str(patient))
    held = [r for r in rows if r.patient in chosen]
    pool = [r for r in rows if r.patient not in chosen]
    np.random.default_rng(1).shuffle(pool)  # type: ignore[arg-type]
    return Task(pool, held[:: max(1, len(held) // held_out)][:held_out], methods)


def _written(path: Path, write: Callable[[Path], None]) -> Path:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    return path


def _threshold(source: Path, path: Path) -> None:
    grey = np.asarray(Image.open(source).convert("L"))
    Image.fromarray((grey >= 128).astype(np.uint8)).save(path)


def _merge(source: Path, path: Path) -> None:
    labels = medseg.read_labels(source)
    merged = (np.asarray(labels.array) > 0).astype(np.uint8)
    medseg.write(medseg.LabelMap(merged, labels.geometry, (medseg.Structure(1, "Hippocampus"),)), path)


if __name__ == "__main__":
    main()
