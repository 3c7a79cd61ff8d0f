"""The dense CRF beside pydensecrf2: error against the exact marginals, and time.

``python workflows/bench/crf.py [LABELS ...]`` (2 and 6 by default). One CT-like slice of 512 x 512, one CPU thread;
needs ``pip install pydensecrf2``, which compiles.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import pydensecrf.densecrf as peer
import torch
from scipy import ndimage

from medseg.crf import dense_crf

SIZE, ITERATIONS = 512, 5
GAUSSIAN, BILATERAL = (3.0, 3.0), (80.0, 13.0, 10.0)  # sigma and weight; sigma in space, in intensity, weight


def slice_like_ct(labels: int) -> tuple[np.ndarray, np.ndarray]:
    """An 8-bit image (H, W) with ``labels - 1`` organs, and soft, low-resolution probabilities (K, H, W) of them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    hu, regions = np.full((SIZE, SIZE), -1000.0), np.zeros((SIZE, SIZE), int)
    hu[(x / 0.42) ** 2 + (y / 0.34) ** 2 < 1] = -90
    hu[(x / 0.36) ** 2 + (y / 0.28) ** 2 < 1] = 40
    for label in range(1, labels):
        centre, radii = rng.uniform(-0.22, 0.22, 2), rng.uniform(0.03, 0.09 if labels > 3 else 0.14, 2)
        rough = 1.2 * ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 8)
        organ = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + rough < 1
        regions[organ], hu[organ] = label, rng.uniform(-60, 180)
    hu = ndimage.gaussian_filter(hu, 1) + 18 * ndimage.gaussian_filter(rng.standard_normal(hu.shape), 0.7)
    coarse = ndimage.zoom(ndimage.zoom(regions, 0.25, order=0), 4, order=0)
    logits = 9 * ndimage.gaussian_filter(np.eye(labels)[coarse].transpose(2, 0, 1), (0, 3, 3))
    logits += 2.8 * ndimage.gaussian_filter(rng.standard_normal(logits.shape), (0, 2, 2))
    p = np.exp(logits)
    return np.clip((hu + 160) / 400 * 255, 0, 255).round().astype(np.float32), (p / p.sum(0)).astype(np.float32)


def by_peer(image: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Marginals (K, H, W) by pydensecrf with the intensity as one feature."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    crf = peer.DenseCRF(SIZE * SIZE, len(p))
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(p, 1e-5, 1)).reshape(len(p), -1)))
    crf.addPairwiseEnergy(np.stack([y.ravel(), x.ravel()]) / np.float32(GAUSSIAN[0]), compat=GAUSSIAN[1])
    features = [y.ravel() / BILATERAL[0], x.ravel() / BILATERAL[0], image.ravel() / BILATERAL[1]]
    crf.addPairwiseEnergy(np.stack(features).astype(np.float32), compat=BILATERAL[2])
    return np.array(crf.inference(ITERATIONS)).reshape(p.shape)


def by_us(image: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Marginals (K, H, W) by medseg."""
    return np.asarray(dense_crf(torch.as_tensor(image)[None, None], torch.as_tensor(p)[None])[0])


def exact(image: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Exact marginals in float64: an 8-bit image has 256 layers, in each of which the bilateral kernel is separable."""

    def gram(n: int, sigma: float) -> np.ndarray:
        return np.exp(-0.5 * np.square((np.arange(n)[:, None] - np.arange(n)) / sigma))

    near, far, grey = gram(SIZE, GAUSSIAN[0]), gram(SIZE, BILATERAL[0]), gram(256, BILATERAL[1])
    values = image.astype(int)
    levels = np.unique(values)

    def bilateral(q: np.ndarray) -> np.ndarray:
        out = np.zeros_like(q)
        for level in levels:
            out += grey[values, level] * (far @ np.where(values == level, q, 0) @ far)
        return out

    ones = np.ones_like(image, np.float64)
    scales = 1 / np.sqrt(near @ ones @ near), 1 / np.sqrt(bilateral(ones))

    def message(q: np.ndarray) -> np.ndarray:
        gaussian = scales[0] * (near @ (scales[0] * q) @ near)
        return np.asarray(GAUSSIAN[1] * gaussian + BILATERAL[2] * scales[1] * bilateral(scales[1] * q))

    logits = np.log(np.clip(p.astype(float), 1e-5, 1))
    q = np.exp(logits) / np.exp(logits).sum(0)
    for _ in range(ITERATIONS):
        new = logits + np.stack([message(channel) for channel in q])
        new = np.exp(new - new.max(0))
        q = new / new.sum(0)
    return q


def fastest(run: Callable[[], np.ndarray], repeats: int = 5) -> tuple[float, np.ndarray]:
    """CPU seconds of the fastest call, and its result."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        taken.append(time.process_time() - start)
    return min(taken), result


def main() -> None:
    torch.set_num_threads(1)
    print("| labels | way | CPU s | times pydensecrf2 | max error | mean error | labels that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for labels in [int(a) for a in sys.argv[1:]] or [2, 6]:
        image, p = slice_like_ct(labels)
        truth = exact(image, p)
        ways = {
            "pydensecrf2": fastest(lambda image=image, p=p: by_peer(image, p)),
            "medseg": fastest(lambda image=image, p=p: by_us(image, p)),
        }
        for name, (seconds, got) in ways.items():
            wrong = 100 * (got.argmax(0) != truth.argmax(0)).mean()
            speed = ways["pydensecrf2"][0] / seconds
            error = np.abs(got - truth)
            print(f"| {labels} | {name} | {seconds:.3f} | {speed:.2f} | {error.max():.4f} |", end="")
            print(f" {error.mean():.1e} | {wrong:.4f} % |", flush=True)


if __name__ == "__main__":
    main()
