"""The dense CRF beside pydensecrf2: error against the exact marginals, and time; or the memory of a large volume.

``python workflows/bench/crf.py [--settings pydensecrf gentle] [--labels 2 6 20] [--threads 1 2] [--phantoms 3]`` prints a
table of CT-like slices of 512 x 512 with the settings of pydensecrf's examples and with medseg's own, gentle ones; it needs
``pip install pydensecrf2``, which compiles and works on one thread whatever is asked.
``--memory SLICES`` refines 512 x 512 x SLICES, 6 labels, and prints the peak of memory.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from medseg import Geometry, Volume, refine
from medseg.crf import dense_crf

SIZE, ITERATIONS = 512, 5


class Setting(NamedTuple):
    """Sigmas in pixels and units of an 8-bit image, weights, and the least probability."""

    near: float
    near_weight: float
    far: float
    intensity: float
    far_weight: float
    clip: float


SETTINGS = {  # the examples of pydensecrf, and medseg's own defaults at 0.78 mm
    "pydensecrf": Setting(3.0, 3.0, 80.0, 13.0, 10.0, 1e-5),
    "gentle": Setting(1.0 / 0.78, 1.0, 6.0 / 0.78, 13.0, 1.0, 1e-3),
}
PHANTOMS = ((9.0, 2.8, 18.0), (6.0, 4.5, 30.0), (12.0, 2.0, 10.0))  # sharpness and noise of probabilities; noise in HU


def slice_like_ct(labels: int, phantom: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An 8-bit image (H, W) with ``labels - 1`` organs, and soft, low-resolution probabilities (K, H, W) of them."""
    sharp, rough_logits, noise = PHANTOMS[phantom]
    rng = np.random.default_rng(phantom)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    hu, regions = np.full((SIZE, SIZE), -1000.0), np.zeros((SIZE, SIZE), int)
    hu[(x / 0.42) ** 2 + (y / 0.34) ** 2 < 1] = -90
    hu[(x / 0.36) ** 2 + (y / 0.28) ** 2 < 1] = 40
    for label in range(1, labels):
        centre, radii = rng.uniform(-0.22, 0.22, 2), rng.uniform(0.03, 0.09 if labels > 3 else 0.14, 2)
        rough = 1.2 * ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 8)
        organ = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + rough < 1
        regions[organ], hu[organ] = label, rng.uniform(-60, 180)
    hu = ndimage.gaussian_filter(hu, 1) + noise * ndimage.gaussian_filter(rng.standard_normal(hu.shape), 0.7)
    coarse = ndimage.zoom(ndimage.zoom(regions, 0.25, order=0), 4, order=0)
    logits = sharp * ndimage.gaussian_filter(np.eye(labels)[coarse].transpose(2, 0, 1), (0, 3, 3))
    logits += rough_logits * ndimage.gaussian_filter(rng.standard_normal(logits.shape), (0, 2, 2))
    p = np.exp(logits)
    return np.clip((hu + 160) / 400 * 255, 0, 255).round().astype(np.float32), (p / p.sum(0)).astype(np.float32)


def by_peer(image: np.ndarray, p: np.ndarray, setting: Setting) -> np.ndarray:
    """Marginals (K, H, W) by pydensecrf with the intensity as one feature."""
    import pydensecrf.densecrf as peer  # not needed for --memory

    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    crf = peer.DenseCRF(SIZE * SIZE, len(p))
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(p).reshape(len(p), -1)))
    crf.addPairwiseEnergy(np.stack([y.ravel(), x.ravel()]) / np.float32(setting.near), compat=setting.near_weight)
    features = [y.ravel() / setting.far, x.ravel() / setting.far, image.ravel() / setting.intensity]
    crf.addPairwiseEnergy(np.stack(features).astype(np.float32), compat=setting.far_weight)
    return np.array(crf.inference(ITERATIONS)).reshape(p.shape)


def by_us(image: np.ndarray, p: np.ndarray, setting: Setting) -> np.ndarray:
    """Marginals (K, H, W) by medseg."""
    found = dense_crf(
        torch.as_tensor(image)[None, None],
        torch.as_tensor(p)[None],
        gaussian_sigma_px=setting.near,
        gaussian_weight=setting.near_weight,
        bilateral_sigma_px=setting.far,
        bilateral_sigma_intensity=setting.intensity,
        bilateral_weight=setting.far_weight,
        iterations=ITERATIONS,
    )
    return np.asarray(found[0])


def exact(image: np.ndarray, p: np.ndarray, setting: Setting) -> np.ndarray:
    """Exact marginals in float64: an 8-bit image has 256 layers, in each of which the bilateral kernel is separable.

    Its matrices over position have few eigenvalues above 1e-13 of the largest: the rest are rounding errors.
    """

    def gram(n: int, sigma: float) -> np.ndarray:
        return np.exp(-0.5 * np.square((np.arange(n)[:, None] - np.arange(n)) / sigma))

    values, vectors = np.linalg.eigh(gram(SIZE, setting.far))
    large = values > 1e-13 * values[-1]
    root = vectors[:, large] * np.sqrt(values[large])  # root @ root.T is the kernel of position
    near, grey = gram(SIZE, setting.near), gram(256, setting.intensity)
    of = image.astype(int)
    levels = np.unique(of)

    def bilateral(q: np.ndarray) -> np.ndarray:
        layers = np.stack([root.T @ np.where(of == level, q, 0) @ root for level in levels])
        layers = np.tensordot(grey[np.ix_(levels, levels)], layers, 1)
        out = np.zeros_like(q)
        for level, layer in zip(levels, layers, strict=True):
            here = of == level
            out[here] = (root @ layer @ root.T)[here]
        return out

    ones = np.ones_like(image, np.float64)
    scales = 1 / np.sqrt(near @ ones @ near), 1 / np.sqrt(bilateral(ones))

    def message(q: np.ndarray) -> np.ndarray:
        gaussian = scales[0] * (near @ (scales[0] * q) @ near)
        return np.asarray(setting.near_weight * gaussian + setting.far_weight * scales[1] * bilateral(scales[1] * q))

    logits = np.log(p.astype(float))
    q = np.exp(logits) / np.exp(logits).sum(0)
    for _ in range(ITERATIONS):
        new = logits + np.stack([message(channel) for channel in q])
        new = np.exp(new - new.max(0))
        q = new / new.sum(0)
    return q


def fastest(run: Callable[[], np.ndarray], repeats: int = 5) -> tuple[float, float, np.ndarray]:
    """CPU and wall seconds of the fastest call, and its result."""
    taken = []
    for _ in range(repeats):
        start = time.process_time(), time.perf_counter()
        result = run()
        taken.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return min(t[0] for t in taken), min(t[1] for t in taken), result


def table(settings: list[str], all_labels: list[int], threads: list[int], phantoms: int) -> None:
    """Error and time of both, a row each."""
    print(
        "| setting | labels | phantom | way | threads | CPU s | wall s | x pydensecrf2 (CPU, wall) | max error ", end=""
    )
    print("| mean error | labels that differ |\n|" + " --- |" * 11)
    for name, labels, phantom in product(settings, all_labels, range(phantoms)):
        setting = SETTINGS[name]
        image, p = slice_like_ct(labels, phantom)
        given = image, np.clip(p, setting.clip, 1 - setting.clip), setting
        truth = exact(*given)
        rows = [("pydensecrf2", 1, *fastest(partial(by_peer, *given)))]
        for count in threads:
            torch.set_num_threads(count)
            rows.append(("medseg", count, *fastest(partial(by_us, *given))))
        for way, count, cpu, wall, got in rows:
            wrong = 100 * (got.argmax(0) != truth.argmax(0)).mean()
            error = np.abs(got - truth)
            print(f"| {name} | {labels} | {phantom} | {way} | {count} | {cpu:.3f} | {wall:.3f} ", end="")
            print(f"| {rows[0][2] / cpu:.2f}, {rows[0][3] / wall:.2f} | {error.max():.4f} ", end="")
            print(f"| {error.mean():.1e} | {wrong:.4f} % |", flush=True)


def memory(slices: int) -> None:
    """Peak of memory beyond input and output for 6 labels of 512 x 512 x slices, all of them with organs."""
    image, p = slice_like_ct(6)
    volume = Volume(np.repeat(image[None, :, :, None], slices, 3), Geometry((SIZE, SIZE, slices), np.eye(4)))
    soft = Volume(np.repeat(p[..., None].astype(np.float16), slices, 3), volume.geometry)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # structures that shrink
        after = refine(volume, soft, device="cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = np.asarray(after.array).nbytes / 2**30
    print(
        f"{slices} slices: {(peak - before) / 2**20:.2f} GiB beyond the input, {result:.2f} of them the result,",
        end=" ",
    )
    print(f"{(peak - before) / 2**20 - result:.2f} for the work; {time.process_time() - start:.0f} CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 6, 20])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--phantoms", type=int, choices=(1, 2, 3), default=3, help="how many of them")
    parser.add_argument("--memory", type=int, metavar="SLICES", help="instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        memory(options.memory)
    else:
        table(options.settings, options.labels, options.threads, options.phantoms)


if __name__ == "__main__":
    main()
