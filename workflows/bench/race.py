"""medseg, MONAI and nnU-Net on one split, for the same minutes: one table, one picture.

    python workflows/bench/race.py DATASET --out DIR --minutes 10 [--systems medseg,monai,nnunet] [--absent unknown]

Every system gets the same training and validation cases and the same wall clock, reading and preprocessing included,
validation at the end not. Predictions of all systems are label maps on the native grids, scored by ``medseg.evaluate``
on the structures that were drawn. A system that was run before into the same DIR is not run again.

- medseg: ``medseg train``, nothing set by hand.
- monai-unet: UNet of residual units, 16 to 256 features, whole volumes in patches of at most 64 x 64 x 64, DiceCE, AdamW
  1e-3 with a cosine to the end of the time (the recipe of MONAI's tutorials in the form that trains best on a CPU).
- monai-dynunet: MONAI's DynUNet pipeline (deep supervision, DiceCE, SGD 0.01 Nesterov 0.99, polynomial decay, its
  augmentation without flips), on the grid, patch and batch of medseg's plan and with its widths: the tutorial's own
  widths would make a few hundred steps out of an hour on a CPU.
- nnunet: nnU-Net's own plan, network, loss, augmentation and optimiser; epochs of 10 steps, its polynomial decay over
  the time that there is (its own fixed 1000 epochs would not have left the start).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import medseg
from medseg.data import Case

AXES = ("image", "label")


@dataclass(frozen=True)
class Race:
    """What all systems are given."""

    dataset: Path
    out: Path
    minutes: float
    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    plan: medseg.Plan
    options: tuple[str, ...]

    def numbers(self) -> list[int]:
        """Labels in the order of the classes."""
        return [0, *(s.number for s in self.plan.structures)]


def main() -> None:
    """Run the race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--systems", default="medseg,monai-unet,nnunet")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--split-seed", type=int, default=12345)
    parser.add_argument("--absent", choices=("background", "unknown"), default="background")
    parser.add_argument("--group")
    given = parser.parse_args()
    found = medseg.load_dataset(given.dataset, group=given.group)
    labelled = [c for c in found.cases if c.label is not None]
    training, validation = medseg.data.folds(labelled, 5, given.split_seed)[given.fold]
    given.out.mkdir(parents=True, exist_ok=True)
    plan_path = given.out / "plan.json"
    if not plan_path.is_file():
        medseg.make_plan(found, training, device="cpu", minutes=given.minutes).save(plan_path)
    options = ["--fold", str(given.fold), "--split-seed", str(given.split_seed), "--absent", given.absent]
    options += ["--group", given.group] if given.group else []
    race = Race(
        given.dataset, given.out, given.minutes, training, validation, medseg.Plan.load(plan_path), tuple(options)
    )
    for system in given.systems.split(","):
        if not (given.out / system / "curve.json").is_file():
            SYSTEMS[system](race, given.out / system)
        score(race, system)
    table(given.out)


def score(race: Race, system: str) -> None:
    """Rows of metrics of the predictions, on the structures that each reference holds."""
    rows = []
    for case in race.validation:
        reference = medseg.read_labels(str(case.label))
        prediction = medseg.read_labels(race.out / system / "predictions" / f"{case.id}.nii.gz")
        rows += medseg.evaluate(prediction, reference, labels_present=True, surface=False).rows
    dice = [r["dice"] for r in rows if np.isfinite(r["dice"])]
    names = sorted({r["structure"] for r in rows})
    result = {"dice": float(np.mean(dice)), "minutes": race.minutes, "cases": len(race.validation)}
    by_name = {n: float(np.nanmean([r["dice"] for r in rows if r["structure"] == n])) for n in names}
    result["mean of structures"] = float(np.mean(list(by_name.values())))
    (race.out / system / "score.json").write_text(json.dumps({**result, **by_name}, indent=1))


def table(out: Path) -> None:
    """Print the scores side by side and draw the curves."""
    import matplotlib.pyplot as plt

    scores = {p.parent.name: json.loads(p.read_text()) for p in sorted(out.glob("*/score.json"))}
    first = max(s["mean of structures"] for s in scores.values())
    print("| system | minutes | mean Dice of structures | against the best | steps | seconds a step | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plt.rcdefaults()  # nnU-Net leaves another style behind
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for system, row in scores.items():
        curve = json.loads((out / system / "curve.json").read_text())
        facts = " | ".join(f"{curve[k]:.4g}" if curve.get(k) else "-" for k in ("steps", "step_s", "peak_gb"))
        mean = row["mean of structures"]
        print(f"| {system} | {row['minutes']:g} | {mean:.3f} | {mean - first:+.3f} | {facts} |")
        points = [*curve["points"], [row["minutes"], mean]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{system} {mean:.3f}")
    axes.set(xlabel="minutes", ylabel="mean Dice", title="Validation; the last point is of all cases, native grids")
    axes.legend()
    figure.savefig(out / "race.png", dpi=110)


def save_predictions(
    race: Race, folder: Path, predict: Callable[[Case], Tensor], case_grid: Callable[[Case], Any]
) -> None:
    """Write label maps on native grids from probabilities (K, *grid) on the planned grid."""
    for case in race.validation:
        probabilities, grid = predict(case), case_grid(case)
        native = medseg.read(case.images[0]).geometry
        soft = medseg.resample_to(medseg.Volume(probabilities.float().numpy(), grid), native, "linear")
        classes = np.asarray(soft.array).argmax(0)
        labels = np.array(race.numbers(), np.uint8)[classes]
        medseg.write(medseg.LabelMap(labels, native), folder / f"{case.id}.nii.gz", force=True)


# ---------------------------------------------------------------------------------------------------------------------
# medseg


def run_medseg(race: Race, out: Path) -> None:
    """``medseg train`` as a user would, and ``medseg predict``."""
    options = [*race.options, "--minutes", str(race.minutes), "--force"]
    command = [sys.executable, "-m", "medseg.cli"]
    subprocess.run([*command, "train", str(race.dataset), "--out", str(out / "run"), *options], check=True)
    for case in race.validation:
        images = [str(p) for p in case.images]
        predicted = medseg.predict(out / "run", images if len(images) > 1 else images[0], device="cpu")
        medseg.write(predicted, out / "predictions" / f"{case.id}.nii.gz", force=True)
    history = json.loads((out / "run" / "history.json").read_text())
    points = [[h["minutes"], h["dice"]] for h in history]
    facts = json.loads((out / "run" / "training.json").read_text())
    save_curve(out, points, steps=facts["steps"], step_s=facts["step_s"], peak_gb=facts["peak_memory_gb"])


def save_curve(out: Path, points: Sequence[Sequence[float]], **facts: float | None) -> None:
    """The course of a training."""
    (out / "curve.json").write_text(json.dumps({"points": [list(p) for p in points], **facts}, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# MONAI


def monai_loader(race: Race, patch: Sequence[int], batch: int, augment: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Deterministic part, cached data set and random part of a pipeline on the grid of medseg's plan."""
    from monai import transforms as mt

    plan = race.plan
    channel = plan.channels[0]
    intensity: Any = mt.NormalizeIntensityd("image", nonzero=False, channel_wise=True)
    if channel.scheme == "ct":
        scaled = mt.ScaleIntensityRanged("image", channel.low, channel.high, channel.low, channel.high, clip=True)
        intensity = mt.Compose([scaled, mt.NormalizeIntensityd("image", channel.mean, channel.std)])
    numbers = race.numbers()
    fixed = mt.Compose(
        [
            mt.LoadImaged(AXES, allow_missing_keys=True),
            mt.EnsureChannelFirstd(AXES, allow_missing_keys=True),
            mt.Orientationd(AXES, axcodes=plan.orientation, labels=None, allow_missing_keys=True),
            mt.Spacingd(AXES, plan.spacing, mode=("bilinear", "nearest"), allow_missing_keys=True),
            intensity,
            mt.MapLabelValued("label", numbers, list(range(len(numbers))), allow_missing_keys=True),
            mt.SpatialPadd(AXES, patch, mode=("edge", "constant"), allow_missing_keys=True),
        ]
    )
    random = mt.Compose([mt.RandCropByPosNegLabeld(AXES, "label", patch, pos=1, neg=1, num_samples=batch), *augment])
    cached = [fixed({"image": str(c.images[0]), "label": str(c.label)}) for c in race.training]
    return fixed, cached, random


def monai_batches(cached: Sequence[Any], random: Any, seed: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
    """Endless batches: every patch of a batch from one case, as the crops of the pipeline come."""
    generator = np.random.default_rng(seed)
    random.set_random_state(seed)
    while True:
        parts = random(cached[int(generator.integers(len(cached)))])
        yield (
            torch.stack([p["image"].as_tensor() for p in parts]),
            torch.stack([p["label"].as_tensor() for p in parts]),
        )


def monai_fit(race: Race, out: Path, patch: Sequence[int], parts: dict[str, Any], begin: float) -> None:
    """Train to the end of the time, then predict the validation cases with a Gaussian sliding window."""
    from monai.inferers import sliding_window_inference

    fixed, cached, random = parts["data"]
    network, optimizer, loss_of, rate = parts["network"], parts["optimizer"], parts["loss"], parts["rate"]
    first, losses, points, steps = float(optimizer.param_groups[0]["lr"]), [], [], 0
    half = parts["bf16"]
    validation = {c.id: fixed({"image": str(c.images[0])})["image"] for c in race.validation}

    def probabilities(case: Case) -> Tensor:
        network.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = sliding_window_inference(
                validation[case.id].as_tensor()[None], patch, 2, network, overlap=0.5, mode="gaussian"
            )
        network.train()
        return torch.as_tensor(logits)[0].float().softmax(0)

    lost, looks = 0.0, [0.25, 0.5, 0.75]  # looks at the first cases do not count as time
    begun = time.monotonic()
    for images, labels in monai_batches(cached, random):
        share = (time.monotonic() - begin - lost) / (60 * race.minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = first * rate(share)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        steps += 1
        if looks and share >= looks[0]:
            looks.pop(0)
            stopped = time.monotonic()
            dice = [
                rough_dice(probabilities(c), fixed({"image": str(c.images[0]), "label": str(c.label)})["label"])
                for c in race.validation[:4]
            ]
            lost += time.monotonic() - stopped
            points.append([share * race.minutes, float(np.mean(dice))])
            print(
                f"{out.name}: {share * race.minutes:.1f} min, step {steps}, loss {np.mean(losses[-20:]):.3f}, Dice "
                f"{points[-1][1]:.3f}",
                file=sys.stderr,
            )
    step_s = (time.monotonic() - begun - lost) / max(1, steps)

    def grid(case: Case) -> Any:
        image = validation[case.id]
        return medseg.Geometry(tuple(image.shape[1:]), np.asarray(image.affine, float))

    save_predictions(race, out / "predictions", probabilities, grid)
    import resource

    save_curve(
        out, points, steps=steps, step_s=step_s, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )


def rough_dice(probabilities: Tensor, label: Tensor) -> float:
    """Mean Dice on the planned grid, of the structures that are there."""
    classes = probabilities.argmax(0)
    truth = torch.as_tensor(label)[0].long()
    present = [int(c) for c in truth.unique() if c > 0]
    return float(
        np.mean(
            [
                2 * float(((classes == c) & (truth == c)).sum()) / float((classes == c).sum() + (truth == c).sum())
                for c in present
            ]
        )
    )


def faster_in_half(network: torch.nn.Module, patch: Sequence[int]) -> bool:
    """Whether bfloat16 autocast makes a step faster on this machine."""
    seconds = {}
    for half in (False, True):
        for _ in range(2):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = network(torch.randn(1, 1, *patch))
            out.float().mean().backward()
            seconds[half] = time.perf_counter() - begin
    return seconds[True] < seconds[False]


def run_monai_unet(race: Race, out: Path) -> None:
    """MONAI's UNet with residual units."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    from monai.transforms import RandAffined, RandGaussianNoised, RandScaleIntensityd

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    patch = [min(64, 16 * -(-p // 16)) for p in race.plan.patch]
    network = UNet(3, 1, len(race.numbers()), (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="instance")
    augment = [
        RandAffined(
            AXES, prob=0.3, rotate_range=[0.3] * 3, scale_range=[0.2] * 3, mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        RandScaleIntensityd("image", 0.2, prob=0.2),
        RandGaussianNoised("image", prob=0.15, std=0.1),
    ]  # fmt: skip
    loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    parts = {
        "data": monai_loader(race, patch, 4, augment),
        "network": network,
        "optimizer": torch.optim.AdamW(network.parameters(), 1e-3),
        "loss": loss,
        "rate": lambda share: 0.5 * (1 + np.cos(np.pi * share)),
        "bf16": faster_in_half(network, patch),
    }
    monai_fit(race, out, patch, parts, begin)


def run_monai_dynunet(race: Race, out: Path) -> None:
    """MONAI's DynUNet pipeline."""
    from monai import transforms as mt
    from monai.losses import DiceCELoss
    from monai.networks.nets import DynUNet

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    plan = race.plan
    strides = [(1,) * plan.dims, *plan.strides]
    network = DynUNet(
        plan.dims, 1, len(race.numbers()), plan.kernels, strides, plan.strides, filters=plan.features, norm_name="instance",
        deep_supervision=True, deep_supr_num=max(1, len(plan.strides) - 1), res_block=False,
    )  # fmt: skip
    augment = [
        mt.RandZoomd(AXES, 0.15, 0.9, 1.2, mode=("trilinear", "nearest"), align_corners=(True, None)),
        mt.RandGaussianNoised("image", prob=0.15, std=0.01),
        mt.RandGaussianSmoothd("image", (0.5, 1.15), (0.5, 1.15), (0.5, 1.15), prob=0.15),
        mt.RandScaleIntensityd("image", 0.3, prob=0.15),
    ]
    dice_ce = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)

    def loss(levels: Tensor, labels: Tensor) -> Tensor:
        weights = [0.5**n for n in range(levels.shape[1])]
        each = [w * dice_ce(levels[:, n].float(), labels) for n, w in enumerate(weights)]
        return torch.stack(each).sum() / sum(weights)

    parts = {
        "data": monai_loader(race, plan.patch, plan.batch, augment),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5),
        "loss": loss,
        "rate": lambda share: (1 - share) ** 0.9,
        "bf16": faster_in_half(network, plan.patch),
    }
    monai_fit(race, out, plan.patch, parts, begin)


# ---------------------------------------------------------------------------------------------------------------------
# nnU-Net


def run_nnunet(race: Race, out: Path) -> None:
    """nnU-Net in folders of its own, with its trainer told to end with the time."""
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(out / name)
    os.environ["nnUNet_" + "n_proc_DA"] = "1"
    os.environ["nnUNet_" + "compile"] = "false"
    name = "Dataset001_Race"
    raw = out / "raw" / name
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    numbers = race.numbers()
    for case in (*race.training, *race.validation):
        image, label = medseg.read(case.images[0]), medseg.read_labels(str(case.label)).exclusive()
        classes = np.searchsorted(numbers, np.asarray(label.array)).astype(np.uint8)
        medseg.write(image, raw / "imagesTr" / f"{case.id}_0000.nii.gz", force=True)
        medseg.write(medseg.LabelMap(classes, image.geometry), raw / "labelsTr" / f"{case.id}.nii.gz", force=True)
    channel = "CT" if race.plan.channels[0].scheme == "ct" else "MR"
    labels = {"background": 0, **{f"class {c}": c for c in range(1, len(numbers))}}
    count = len(race.training) + len(race.validation)
    header = {"channel_names": {"0": channel}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(header))
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )  # fmt: skip

    extract_fingerprints([1], num_processes=2, check_dataset_integrity=False, clean=True)
    plan_experiments([1])
    preprocess([1], "nnUNetPlans", configurations=["3d_fullres"], num_processes=[2])
    os.environ["nnUNet_" + "n_proc_DA"] = "0"  # augmentation in this process, on the cores that there are
    split = [{"train": [c.id for c in race.training], "val": [c.id for c in race.validation]}]
    folder = out / "preprocessed" / name
    (folder / "splits_final.json").write_text(json.dumps(split))
    trainer = timed_trainer()(
        {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}, "3d_fullres", 0,
        json.loads((folder / "dataset.json").read_text()), torch.device("cpu"),
    )  # fmt: skip
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 10, 1
    trainer.num_epochs, trainer.save_every, trainer.points = 100_000, 10**9, []
    trainer.end = begin + 60 * race.minutes
    trainer.race_begin = begin
    trainer.run_training()
    trainer.perform_actual_validation()
    for case in race.validation:
        made = medseg.read_labels(Path(trainer.output_folder) / "validation" / f"{case.id}.nii.gz")
        array = np.array(numbers, np.uint8)[np.asarray(made.array)]
        medseg.write(medseg.LabelMap(array, made.geometry), out / "predictions" / f"{case.id}.nii.gz", force=True)
    steps = 10 * len(trainer.points)
    save_curve(out, trainer.points, steps=steps, step_s=60 * race.minutes / max(1, steps), peak_gb=None)


def timed_trainer() -> type:
    """nnU-Net's trainer with epochs of 10 steps, learning rate by the clock, and an end."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class TimedTrainer(nnUNetTrainer):
        end: float
        race_begin: float

        points: list[list[float]]

        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            now = time.monotonic()
            share = min(1.0, (now - self.race_begin) / (self.end - self.race_begin))
            self.optimizer.param_groups[0]["lr"] = self.initial_lr * (1 - share) ** 0.9

        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            now = time.monotonic()
            dice = float(self.logger.get_value("mean_fg_dice", step=-1))
            self.points.append([(now - self.race_begin) / 60, dice])
            if now >= self.end:
                self.num_epochs = self.current_epoch

        def run_training(self) -> None:
            self.on_train_start()
            while self.current_epoch < self.num_epochs:
                self.on_epoch_start()
                self.on_train_epoch_start()
                self.on_train_epoch_end([self.train_step(next(self.dataloader_train)) for _ in range(10)])
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val))])
                self.on_epoch_end()
            self.on_train_end()

    return TimedTrainer


SYSTEMS: dict[str, Callable[[Race, Path], None]] = {
    "medseg": run_medseg,
    "monai-unet": run_monai_unet,
    "monai-dynunet": run_monai_dynunet,
    "nnunet": run_nnunet,
}

if __name__ == "__main__":
    main()
