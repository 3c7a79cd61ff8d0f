"""Fine-tune a promptable model's decoder for boxes on your cases, and compare it on others with what it started from.

python workflows/finetune_sam_med.py TRAINING OTHERS --minutes 25

The image encoder stays as it is and sees each slice once; the run folder is a model for ``medseg contour --model RUN``.
For a network that needs no prompts use ``medseg train TRAINING --model sam-med``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

import medseg
from medseg.finetuning import score_boxes


@dataclass(frozen=True)
class Recipe:
    """What is trained, for how long, on what it is tested, and where it goes."""

    dataset: Positional[Path]
    """Cases to learn from: folder with images/ and labels/, Decathlon or nnU-Net folder, or CSV."""
    others: Positional[Path]
    """Cases of other patients to test on, in the same form."""
    out: Path = Path("runs/sam-med-box")
    """Run folder."""
    init: str | None = None
    """lite-medsam, or NAME:FILE for another model with its checkpoint."""
    minutes: float = 25.0
    """Time for embeddings and training."""
    foreground: bool = False
    """Learn all labels as one structure."""
    group: str | None = None
    """Regular expression whose group 1 on the case id is the patient."""
    slices: int = 300
    """Slices of the other cases to test on, spread evenly."""
    cache: Path = Path("runs/sam-med-cache")
    """Preprocessed cases and embeddings, used again the next time."""


def main(recipe: Recipe) -> None:
    """Train, then print Dice of exact boxes on the other cases."""
    config = medseg.TrainConfig(
        dataset=recipe.dataset,
        out=recipe.out,
        model="sam-med-box",
        init=recipe.init,
        minutes=recipe.minutes,
        foreground=recipe.foreground,
        group=recipe.group,
        cache=recipe.cache,
    )
    run = medseg.train(config)
    others = medseg.load_dataset(recipe.others, group=recipe.group)
    scores = score_boxes(run, others, recipe.cache, slices=recipe.slices)
    print(f"{'structure':20s} {'before':>7s} {'after':>7s} {'ellipse':>7s}   mean Dice of {len(others.cases)} cases")
    for rows in zip(*(scores[name].summary for name in ("before", "after", "ellipse")), strict=True):
        print(f"{rows[0]['structure']:20s} " + " ".join(f"{row['dice']['mean']:7.3f}" for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Recipe))
