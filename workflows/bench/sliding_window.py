"""Sliding windows to labels, and the return to the native grid, against MONAI and plain torch.

Run: python workflows/bench/sliding_window.py   (one thread; about five minutes, 6 GB)
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from _measure import measure, show
from monai.inferers import SlidingWindowInferer
from scipy import ndimage

from medseg.decision import decide
from medseg.sliding_window import predict_labels
from medseg.volume import Geometry

CLASSES, SHAPE, PATCH, STEP = 6, (256, 512, 512), (64, 128, 128), (32, 64, 64)
PLANNED = (256, 273, 273)


def windows_alone(image: torch.Tensor) -> str:
    """The calls of the network that every way needs, and nothing else."""
    network, calls = torch.nn.Conv3d(1, CLASSES, 1), 0
    with torch.inference_mode():
        for i in range(0, SHAPE[0] - PATCH[0] + 1, STEP[0]):
            for j in range(0, SHAPE[1] - PATCH[1] + 1, STEP[1]):
                for k in range(0, SHAPE[2] - PATCH[2] + 1, STEP[2]):
                    network(image[None, :, i : i + PATCH[0], j : j + PATCH[1], k : k + PATCH[2]])
                    calls += 1
    return f"{calls} calls"


def monai_logits(image: torch.Tensor) -> torch.Tensor:
    """MONAI's sliding window with Gaussian weights."""
    inferer = SlidingWindowInferer(PATCH, 1, 0.5, mode="gaussian")
    with torch.inference_mode():
        return inferer(image[None], torch.nn.Conv3d(1, CLASSES, 1))[0]


def monai_to_logits(image: torch.Tensor) -> str:
    """Without the decision."""
    return f"logits {tuple(monai_logits(image).shape)}"


def monai_to_labels(image: torch.Tensor) -> str:
    """With torch's argmax."""
    return f"labels {tuple(monai_logits(image).argmax(0).to(torch.uint8).shape)}"


def ours_to_labels(image: torch.Tensor) -> str:
    """Ours, one window per call."""
    return f"labels {tuple(predict_labels(torch.nn.Conv3d(1, CLASSES, 1), image, PATCH).shape)}"


def scan() -> torch.Tensor:
    """Random voxels (1, *SHAPE)."""
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))


def organs() -> torch.Tensor:
    """Logits (CLASSES, *PLANNED) of smooth structures that fill about a tenth of the volume."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(CLASSES, 32, 34, 34)).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, (0, 1.5, 1.5, 1.5))
    coarse[0] += 1.5 * coarse.std()
    return 5 * F.interpolate(torch.from_numpy(coarse)[None], PLANNED, mode="trilinear")[0]


def noise() -> torch.Tensor:
    """Logits of an untrained network: boundaries everywhere."""
    return torch.randn(CLASSES, *PLANNED, generator=torch.Generator().manual_seed(0))


def trilinear_then_argmax(logits: torch.Tensor) -> str:
    """The short way: all logits on the native grid."""
    labels = F.interpolate(logits[None], SHAPE, mode="trilinear")[0].argmax(0).to(torch.uint8)
    return f"{int(torch.count_nonzero(labels))} foreground"


def class_by_class(logits: torch.Tensor) -> str:
    """One class at a time and a running maximum."""
    best, labels = torch.full(SHAPE, -torch.inf), torch.zeros(SHAPE, dtype=torch.uint8)
    for number, one in enumerate(logits):
        values = F.interpolate(one[None, None], SHAPE, mode="trilinear")[0, 0]
        labels[values > best] = number
        torch.maximum(best, values, out=best)
    return f"{int(torch.count_nonzero(labels))} foreground"


def ours_decide(logits: torch.Tensor) -> str:
    """Ours: planes, interpolated only where neighbours differ."""
    target = Geometry.from_parts(SHAPE, (1.5, 0.8, 0.8))
    labels = decide(logits, target.with_shape(PLANNED), target)
    return f"{int(torch.count_nonzero(labels))} foreground"


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    ways = {
        "the windows alone": windows_alone,
        "MONAI SlidingWindowInferer, gaussian": monai_to_logits,
        "the same, argmax": monai_to_labels,
        "medseg predict_labels": ours_to_labels,
    }
    title = f"{SHAPE} voxels, windows {PATCH}, overlap 0.5, {CLASSES} classes, 1x1x1 convolution, 1 thread"
    show(title, {name: measure(way, scan) for name, way in ways.items()}, "medseg predict_labels")
    for name, logits in {"smooth structures": organs, "noise": noise}.items():
        ways = {
            "torch trilinear, argmax": trilinear_then_argmax,
            "torch class by class": class_by_class,
            "medseg decide": ours_decide,
        }
        title = f"Logits ({CLASSES}, {PLANNED}) of {name} to labels {SHAPE}, 1 thread"
        show(title, {n: measure(way, logits) for n, way in ways.items()}, "medseg decide")


if __name__ == "__main__":
    main()
