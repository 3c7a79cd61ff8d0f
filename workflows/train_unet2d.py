"""Train a 2D U-Net on pictures, or on volumes slice by slice, and look at the validation.

python workflows/train_unet2d.py DATASET --group "(.+?)-IM-"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

import medseg


@dataclass(frozen=True)
class Recipe:
    """What is trained, for how long, and where it goes."""

    dataset: Positional[Path]
    """Folder with images/ and labels/, Decathlon or nnU-Net folder, or CSV."""
    out: Path = Path("runs/unet2d")
    """Run folder."""
    minutes: float = 10.0
    """Time for everything: reading, training, validation."""
    fold: int = 0
    """Which fifth of the cases is held out."""
    group: str | None = None
    """Regular expression whose group 1 on the case id is the patient."""


def main(recipe: Recipe) -> None:
    """Train and print the validation, structure by structure."""
    config = medseg.TrainConfig(
        dataset=recipe.dataset,
        out=recipe.out,
        model="unet2d",
        minutes=recipe.minutes,
        fold=recipe.fold,
        group=recipe.group,
    )
    run = medseg.train(config)
    for row in run.evaluation().summary:
        print(f"{row['structure']:20s} Dice {row['dice']['mean']:.3f}  IoU {row['iou']['mean']:.3f}")
    print(f"report: {run.path / 'report.html'}")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
