"""Augmentation of one batch on one CPU thread: medseg, MONAI and nnU-Net's batchgeneratorsv2.

    python workflows/bench/augment.py [--batch 9] [--patch 40 56 40] [--rounds 30]

All do rotation, scaling, mirroring, blur, low resolution, brightness, contrast, noise and gamma with nnU-Net's chances,
on labels of three classes as well. MONAI runs as its users run it, sample by sample, and on the whole batch at once with
the images as channels, where all share one draw. Rounds of all systems alternate, so that a busy machine slows all
alike; CPU seconds are the median over the rounds, and the rounds draw differently. Needs ``pip install
batchgeneratorsv2`` for nnU-Net's line, which is left out otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import monai.transforms as mt
import numpy as np
import torch

from medseg.augmentation import Augmentation

BOTH = ("image", "label")


def medseg_system(images: torch.Tensor, labels: torch.Tensor) -> Callable[[int], Any]:
    augment = Augmentation((1.0,) * (images.ndim - 2), mirror=tuple(range(images.ndim - 2)))
    known = torch.ones(len(images), 2, dtype=torch.bool)
    return lambda seed: augment(images, labels, known, torch.Generator().manual_seed(seed))


def monai_transforms(dims: int) -> mt.Compose:
    angle = (math.radians(20),) * (3 if dims == 3 else 1)
    linear_nearest = ("bilinear", "nearest")
    return mt.Compose(
        [
            mt.RandAffined(
                BOTH, None, 0.36, angle, scale_range=(0.22,) * dims, mode=linear_nearest, padding_mode="border"
            ),
            *(mt.RandFlipd(BOTH, 0.5, axis) for axis in range(dims)),
            mt.RandGaussianSmoothd("image", (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.1),
            mt.RandSimulateLowResolutiond("image", 0.125, zoom_range=(0.5, 1.0)),
            mt.RandScaleIntensityd("image", 0.25, 0.15),
            mt.RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            mt.RandGaussianNoised("image", 0.1, std=0.1),
            mt.RandAdjustContrastd("image", 0.37, (0.7, 1.5), retain_stats=True),
        ]
    )  # fmt: skip


def monai_system(images: torch.Tensor, labels: torch.Tensor, per_sample: bool) -> Callable[[int], Any]:
    transforms = monai_transforms(images.ndim - 2)

    def run(seed: int) -> Any:
        transforms.set_random_state(seed)
        if not per_sample:
            return transforms({"image": images[:, 0], "label": labels})
        return [transforms({"image": i, "label": t[None]}) for i, t in zip(images, labels, strict=True)]

    return run


def nnunet_system(images: torch.Tensor, labels: torch.Tensor) -> Callable[[int], Any]:
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    angle, axes = math.radians(30), tuple(range(images.ndim - 2))
    transforms = ComposeTransforms(
        [
            SpatialTransform(
                tuple(images.shape[2:]), 0, False, p_rotation=0.2, rotation=(-angle, angle), p_scaling=0.2,
                scaling=(0.7, 1.4), p_synchronize_scaling_across_axes=1,
            ),
            RandomTransform(GaussianNoiseTransform((0, 0.1), 1, True), 0.1),
            RandomTransform(GaussianBlurTransform((0.5, 1.0), False, False, 0.5), 0.2),
            RandomTransform(MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), False, 1), 0.15),
            RandomTransform(ContrastTransform(BGContrast((0.75, 1.25)), True, False, 1), 0.15),
            RandomTransform(SimulateLowResolutionTransform((0.5, 1), False, True, (), None, 0.5), 0.25),
            RandomTransform(GammaTransform(BGContrast((0.7, 1.5)), 1, False, 1, 1), 0.1),
            RandomTransform(GammaTransform(BGContrast((0.7, 1.5)), 0, False, 1, 1), 0.3),
            MirrorTransform(axes),
        ]
    )  # fmt: skip

    def run(seed: int) -> Any:
        np.random.seed(seed)  # noqa: NPY002  what the library draws from
        torch.manual_seed(seed)
        return [transforms(image=i, segmentation=t[None]) for i, t in zip(images, labels, strict=True)]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=9)
    parser.add_argument("--patch", type=int, nargs="+", default=[40, 56, 40], help="voxels, two or three axes")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 1, *options.patch, generator=generator)
    labels = torch.randint(0, 3, (options.batch, *options.patch), generator=generator)
    systems = {
        "medseg": medseg_system(images, labels),
        "MONAI, sample by sample": monai_system(images, labels, per_sample=True),
        "MONAI, one draw for all": monai_system(images, labels, per_sample=False),
    }
    if importlib.util.find_spec("batchgeneratorsv2"):
        systems["nnU-Net (batchgeneratorsv2)"] = nnunet_system(images, labels)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for seed in range(options.rounds + 2):
        for name, run in systems.items():
            begin = time.process_time()
            run(seed)
            if seed >= 2:  # the first rounds warm up
                seconds[name].append(time.process_time() - begin)
    own = statistics.median(seconds["medseg"])
    print(f"{options.batch} patches of {' x '.join(map(str, options.patch))}, one thread, {options.rounds} rounds")
    print("| system | CPU s, median | mean | over medseg |\n| --- | --- | --- | --- |")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.4f} | {statistics.mean(times):.4f} | {median / own:.1f} |")


if __name__ == "__main__":
    main()
