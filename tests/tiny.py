"""A tiny data set that a tiny network learns in seconds: a bright ball and a dark one in noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import medseg
from medseg.config import TrainConfig
from medseg.plan import ChannelPlan, Plan, StructurePlan
from medseg.volume import Geometry, LabelMap, Structure, Volume

STRUCTURES = (Structure(2, "bright"), Structure(5, "dark"))


def case(seed: int, shape: tuple[int, int, int] = (20, 18, 14)) -> tuple[Volume, LabelMap]:
    """Oblique anisotropic image with two balls (mm), and their labels 2 and 5."""
    generator = np.random.default_rng(seed)
    angle = 0.1 * seed
    direction = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    geometry = Geometry.from_parts(shape, (1.0, 1.2, 2.0), (-40, 7, 13), direction)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * geometry.spacing
    size = np.array(shape) * geometry.spacing
    centre = size * generator.uniform((0.25, 0.35, 0.35), (0.35, 0.65, 0.65))
    other = centre + np.array([size[0] * 0.42, 0, 0])
    labels = np.zeros(shape, np.uint8)
    labels[np.linalg.norm(index - centre, axis=-1) < 4.5] = 2
    labels[np.linalg.norm(index - other, axis=-1) < 4.5] = 5
    array = generator.normal(100, 8, shape) + 60.0 * (labels == 2) - 60.0 * (labels == 5)
    return Volume(array.astype(np.int16), geometry), LabelMap(labels, geometry, STRUCTURES)


def write_dataset(root: Path, count: int = 6) -> Path:
    """A folder with images/ and labels/."""
    for n in range(count):
        image, labels = case(n)
        medseg.write(image, root / "images" / f"case{n}.nii.gz")
        medseg.write(labels, root / "labels" / f"case{n}.nii.gz")
    return root


def plan(dims: int = 3) -> Plan:
    """A plan whose network trains in a second or two."""
    return Plan(
        model=f"unet{dims}d",
        dims=dims,  # type: ignore[arg-type]
        channels=(ChannelPlan(name="MR", scheme="zscore"),),
        structures=tuple(StructurePlan(number=s.number, name=s.name, color=s.color) for s in STRUCTURES),
        orientation="RAS",
        spacing=(1.0, 1.2, 2.0 if dims == 3 else None),
        patch=(16, 16, 12)[:dims],
        batch=4,
        features=(8, 12),
        strides=((2, 2, 2)[:dims],),
        kernels=((3, 3, 3)[:dims],) * 2,
        mirror=(),
    )


def config(dataset: Path, out: Path, **changes: object) -> TrainConfig:
    """A training of two epochs of 20 steps on the CPU, each third of the cases held out in turn."""
    values = {
        "dataset": dataset, "out": out, "epochs": 2, "folds": 3, "precision": "32-true", "device": "cpu",
        "learning_rate": 0.01,
    }  # fmt: skip
    return TrainConfig.make(**{**values, **changes})
