"""Fully connected conditional random field, slice by slice: mean field with a Gaussian and a bilateral kernel.

:func:`dense_crf` works on tensors, :func:`refine` on volumes. The same code runs on any device and is differentiable
with respect to the probabilities.

With unary energies ``U = -log p`` the marginals are found by ``iterations`` steps of ::

    Q <- softmax(-U + sum_k weight_k N_k^-1/2 K_k N_k^-1/2 Q),     Q_0 = softmax(-U)

where ``K_k(i, j) = exp(-|f_i - f_j|^2 / 2)``, ``N_k`` is the diagonal of its row sums and ``f`` is the position over
``gaussian_sigma``, or the position over ``bilateral_sigma`` together with the intensities over their sigma. The message
of a pixel to itself is included; labels interact by the Potts model. This is pydensecrf's model.

References
----------
Krähenbühl & Koltun, NeurIPS 2011, doi:10.48550/arXiv.1210.5644
Chen, Paris & Durand (bilateral grid), ACM Trans Graph 2007, doi:10.1145/1276377.1276506
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from medseg.crf_kernels import Bilateral, Gaussian
from medseg.crf_meanfield import SILENT, MeanField, moving
from medseg.crf_parts import Parts
from medseg.volume import GeometryError, LabelMap, Volume

__all__ = ["CRFParameters", "dense_crf", "refine"]

CLIP = 1e-5  # least probability of the unary energies
SLAB = 1 << 20  # pixels of the slices refined together
FOREGROUND = 0.01  # slices whose foreground stays below this probability are left as they are


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def dense_crf(
    image: Tensor,
    probabilities: Tensor,
    *,
    gaussian_sigma_px: float | Sequence[float] = 3.0,
    gaussian_weight: float | Tensor = 3.0,
    bilateral_sigma_px: float | Sequence[float] = 80.0,
    bilateral_sigma_intensity: float = 13.0,
    bilateral_weight: float | Tensor = 10.0,
    iterations: int = 5,
) -> Tensor:
    """Mean-field marginals of the dense CRF of each image of a batch.

    Parameters
    ----------
    image : (N, C, H, W) tensor
        Images of C = 1 to 4 channels (sequences of MR, or red, green and blue); the intensity distance is Euclidean
        over the channels.
    probabilities : (N, K, H, W) tensor of float
        Probabilities of K >= 2 labels; clipped to at least 1e-5.
    gaussian_sigma_px, bilateral_sigma_px : float or (float, float) (pixels)
        Spatial standard deviations, of one length or along H and W. The defaults are those of pydensecrf's examples:
        they smooth strongly and can erase small structures.
    bilateral_sigma_intensity : float (units of the image)
        Standard deviation in intensity.
    gaussian_weight, bilateral_weight : float or tensor () or (K, K)
        Weights of the kernels; 0 leaves one out. A matrix says how much each label speaks for each other; it is
        symmetrised. A number is that number times the identity (Potts); pydensecrf's matrices are the negative.
    iterations : int
        Steps of the mean field.

    Returns
    -------
    (N, K, H, W) tensor of float32 (or float64, as the probabilities)
        Marginals; they sum to 1 over K.

    Raises
    ------
    ValueError
        If shapes do not fit, a parameter is out of range, an input is not finite, or the bilateral grid would have more
        than 2^26 nodes.

    Notes
    -----
    The Gaussian kernel is exact to 3e-4. The bilateral kernel is interpolated linearly from a grid with three nodes per
    sigma in space and in intensity (two if narrower than 12 px), narrowed so that its variance is right. Where most
    pixels are of one label and the kernel is narrow, the others are worked on in boxes around them, 3 sigma wider.
    Left out are labels whose message would be below 0.05 (log-odds). After the first step only pixels below 0.99, and
    those within 3 pixels of one, still move, between labels above 1e-4. Of the exact marginals all that misses about
    .02 at worst with the default weights on CT-like slices. With a matrix all pixels and labels move in all steps.

    Time and memory grow with N H W and with the labels that are present at a pixel rather than with K, and with the
    nodes of the grid, H W over the square of bilateral_sigma_px. Of several channels only intensities that occur have
    nodes, up to 12288, R of them: time grows with R^2, seconds a slice for four noisy ones, and memory is 4 R^2 bytes.
    Where 4096 do not suffice the nodes lie farther apart, down to one per sigma; the error on 72 x 72 pixels of four
    real sequences of MR was .037 at one node per sigma and .058 at 1.5. It pays to denoise. Differentiable with respect
    to the probabilities and the weights; float64 probabilities are worked on in float64. CUDA adds in any order: for
    results that repeat to the last bit call ``torch.use_deterministic_algorithms(True)`` first.
    """
    image, probabilities = _checked(image, probabilities)
    sigmas = [_pair(gaussian_sigma_px, "gaussian_sigma_px"), _pair(bilateral_sigma_px, "bilateral_sigma_px")]
    if not bilateral_sigma_intensity > 0:
        raise ValueError(f"bilateral_sigma_intensity must be positive, got {bilateral_sigma_intensity}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    weights = [
        _weight(weight, name, probabilities)
        for weight, name in ((gaussian_weight, "gaussian_weight"), (bilateral_weight, "bilateral_weight"))
    ]
    used = [bool((weight != 0).any()) or weight.requires_grad for weight in weights]
    n, k, h, w = probabilities.shape
    p = probabilities.clamp(CLIP, 1).transpose(0, 1).reshape(k, n * h * w)
    logits, q = p.log(), p / p.sum(0)
    potts = all(weight.ndim == 0 for weight in weights)
    if k == 2 and potts:  # one label says it all
        logits, q = logits[1:] - logits[:1], q[1:]
    gaussian = (Gaussian((n, h, w), sigmas[0], q), weights[0]) if used[0] else None
    bilateral: tuple[Bilateral | Parts, Tensor] | None = None
    if used[1]:
        of = image, sigmas[1], bilateral_sigma_intensity
        parts = Parts.worth(*of, q, SILENT / max(1e-9, float(weights[1].detach()))) if potts else None
        bilateral = parts or Bilateral(*of), weights[1]
    field = MeanField(logits, gaussian, bilateral)
    if iterations:
        q = field.step(q)
    if iterations > 1 and potts:
        q = field.settle(q, moving(q, (n, h, w)), iterations - 1)
    else:  # with a matrix every label matters to every other: no short cut
        for _ in range(iterations - 1):
            q = field.step(q)
    if len(q) < k:
        q = torch.cat([1 - q, q])
    return q.reshape(k, n, h, w).transpose(0, 1).contiguous()


def _checked(image: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    if image.ndim != 4 or probabilities.ndim != 4:
        raise ValueError(f"image and probabilities must have 4 axes, got {image.ndim} and {probabilities.ndim}")
    if image.shape[0] != probabilities.shape[0] or image.shape[2:] != probabilities.shape[2:]:
        raise ValueError(
            f"image and probabilities must agree in N, H and W, got {tuple(image.shape)} and "
            f"{tuple(probabilities.shape)}"
        )
    if probabilities.shape[1] < 2:
        raise ValueError(f"probabilities must be of at least 2 labels, got {probabilities.shape[1]}")
    if not 1 <= image.shape[1] <= 4:
        raise ValueError(f"image must have 1 to 4 channels, got {image.shape[1]}; choose the telling ones")
    if image.device != probabilities.device:
        raise ValueError(f"both must be on one device, got {image.device} and {probabilities.device}")
    probabilities = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    image = image.detach().to(probabilities.dtype)
    for name, values in (("image", image), ("probabilities", probabilities)):
        if not bool(torch.isfinite(values.detach().sum())) and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return image, probabilities


def _weight(weight: float | Tensor, name: str, like: Tensor) -> Tensor:
    """() or symmetrised (K, K)."""
    weight = torch.as_tensor(weight, dtype=like.dtype, device=like.device)
    k = like.shape[1]
    if weight.ndim != 0 and weight.shape != (k, k):
        raise ValueError(f"{name} must be a number or ({k}, {k}), got {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()) or (weight.ndim == 0 and float(weight.detach()) < 0):
        raise ValueError(f"{name} must be finite, and a number must not be negative, got {weight.tolist()}")
    return weight if weight.ndim == 0 else (weight + weight.T) / 2


def _pair(sigma: float | Sequence[float], name: str) -> tuple[float, float]:
    a, b = (sigma, sigma) if isinstance(sigma, int | float) else sigma
    if not (0 < a < float("inf") and 0 < b < float("inf")):
        raise ValueError(f"{name} must be positive, got {sigma}")
    return float(a), float(b)


# ---------------------------------------------------------------------------------------------------------------------
# Volumes


@dataclass(frozen=True)
class CRFParameters:
    """Parameters of the CRF on a volume, in mm and in shares of the image's own range or its units (HU).

    The defaults are gentle: they straighten blocky or noisy borders of masks made at low resolution. Sub-voxel
    probabilities of a good model are best left alone: use the CRF where validation shows a gain.

    Parameters
    ----------
    gaussian_sigma_mm, bilateral_sigma_mm : float (mm)
        Spatial standard deviations, divided by the spacing of each in-plane axis (pixels with ``in_pixels``).
    bilateral_sigma_share : float
        Standard deviation in intensity as a share of the range between the 0.5th and 99.5th percentile of the image, to
        which intensities are clipped.
    gaussian_weight, bilateral_weight : float
        Weights of the kernels.
    iterations : int
        Steps of the mean field.
    clip : float
        Probabilities are clipped to [clip, 1 - clip] first: how far the image may overrule a certain model.
    largest_loss : float
        A structure that would lose more than this share of its volume is kept unrefined, with a warning.
    bilateral_sigma_intensity : float, optional (units of the image, HU)
        In place of the share.
    in_pixels : bool
        The spatial standard deviations count pixels, whatever their size, as those of pydensecrf do.
    """

    gaussian_sigma_mm: float = 1.0
    gaussian_weight: float = 1.0
    bilateral_sigma_mm: float = 6.0
    bilateral_sigma_share: float = 13 / 255
    bilateral_weight: float = 1.0
    iterations: int = 5
    clip: float = 1e-3
    largest_loss: float = 0.3
    bilateral_sigma_intensity: float | None = None
    in_pixels: bool = False
    pydensecrf: ClassVar[CRFParameters]

    def __post_init__(self) -> None:
        for name in ("gaussian_sigma_mm", "bilateral_sigma_mm", "bilateral_sigma_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gaussian_weight", "bilateral_weight", "iterations"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.iterations != int(self.iterations):
            raise ValueError(f"iterations must be a whole number, got {self.iterations}")
        if self.bilateral_sigma_intensity is not None and not 0 < self.bilateral_sigma_intensity < float("inf"):
            raise ValueError(f"bilateral_sigma_intensity must be positive, got {self.bilateral_sigma_intensity}")
        if not 0 < self.clip < 0.5 or not 0 <= self.largest_loss <= 1:
            raise ValueError(
                f"clip must be in (0, 0.5) and largest_loss in [0, 1], got {self.clip} and {self.largest_loss}"
            )


# The examples of pydensecrf. On masks of organs and tumours they erase more than they mend.
CRFParameters.pydensecrf = CRFParameters(3.0, 3.0, 80.0, 13 / 255, 10.0, 5, CLIP, 1.0, in_pixels=True)

Probabilities = TypeVar("Probabilities", Volume, LabelMap)


def refine(
    image: Volume,
    probabilities: Probabilities,
    *,
    parameters: CRFParameters | None = None,
    axis: int = 2,
    device: str | torch.device = "auto",
) -> Probabilities:
    """Refine probabilities with the dense CRF, slice by slice.

    Parameters
    ----------
    image : Volume (C, I, J, K)
        The image, C = 1 to 4 channels.
    probabilities : Volume (K, I, J, K) of float, or LabelMap of layers
        Either exclusive labels, background first (one channel alone is that of a foreground), or one layer per structure,
        each of which is refined by itself. A bool layer counts as certain up to ``parameters.clip``, so little moves.
    parameters : CRFParameters, optional
        The gentle defaults if not given; ``CRFParameters.pydensecrf`` are the classic, strong ones.
    axis : int
        Slices are perpendicular to this index axis.
    device : "auto", "cpu", "cuda" ...
        "auto" takes a GPU where there is one.

    Returns
    -------
    Volume or LabelMap
        As given, with refined probabilities of float32. Slices without foreground (below 0.01) are as before.

    Raises
    ------
    GeometryError
        If image and probabilities lie on different grids, or the axes of a slice are not at right angles.
    ValueError
        If the probabilities are not finite or not in 0..1, or the image is not finite.

    Warns
    -----
    UserWarning
        If a structure would lose more than ``parameters.largest_loss`` of its volume and is kept as it was.

    Notes
    -----
    Slices are worked on in slabs of about a million pixels, so memory beyond input and output does not grow with the
    number of slices; it grows with the number of labels and, of several channels, with their nodes in :func:`dense_crf`.
    The result is float32: 6 labels of 512 x 512 x 1000 take 6.3 GB, as the probabilities do.
    """
    parameters = parameters or CRFParameters()
    image.geometry.require_close(probabilities.geometry, "image and probabilities")
    if axis not in (0, 1, 2):
        raise ValueError(f"axis must be 0, 1 or 2, got {axis}")
    across = [a for a in range(3) if a != axis]
    columns = image.geometry.direction[:, across]
    if abs(float(columns[:, 0] @ columns[:, 1])) > 1e-3:
        raise GeometryError("axes of a slice must be at right angles, got a skewed grid; use medseg.straighten")
    before = np.asarray(probabilities.array)
    if before.ndim != 4 or (before.dtype != bool and not np.issubdtype(before.dtype, np.floating)):
        raise TypeError(f"probabilities must be float layers (K, I, J, K), got {before.dtype} {before.shape}")
    if before.dtype != bool and not (float(before.min()) >= -1e-3 and float(before.max()) <= 1 + 1e-3):
        raise ValueError(f"probabilities must be in 0..1, got {before.min()} to {before.max()}")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    work = _Slices(image, parameters, axis, [image.geometry.spacing[a] for a in across], where)
    if isinstance(probabilities, Volume) and len(before) > 1:
        declared = [s.name for s in probabilities.meta.get("structures", ())]
        names = declared if len(declared) == len(before) - 1 else [f"label {k}" for k in range(1, len(before))]
        return replace(probabilities, array=work.refined(before, names))
    after = np.empty(before.shape, np.float32)
    for s in range(len(before)):
        names = [probabilities.structures[s].name] if isinstance(probabilities, LabelMap) else ["label 1"]
        after[s] = work.refined(before[s : s + 1], names)[0]
    return replace(probabilities, array=after)


class _Slices:
    """An image cut into slices, normalised, on which probabilities are refined slab by slab."""

    def __init__(
        self, image: Volume, parameters: CRFParameters, axis: int, spacing: Sequence[float], device: torch.device
    ) -> None:
        self.parameters, self.axis, self.device = parameters, axis, device
        pixels = [1.0, 1.0] if parameters.in_pixels else spacing
        self.sigmas = [
            tuple(sigma / s for s in pixels) for sigma in (parameters.gaussian_sigma_mm, parameters.bilateral_sigma_mm)
        ]
        self.image = np.moveaxis(np.asarray(image.array), axis + 1, 0)  # (slices, C, H, W)
        sample = image.array[(slice(None), *(slice(None, None, max(1, n // 128)) for n in image.geometry.shape))]
        if not np.isfinite(sample).all():
            raise ValueError("image must be finite, got NaN or infinity")
        ends = np.percentile(sample, (0.5, 99.5), axis=(1, 2, 3))
        self.low, self.range = (a.reshape(-1, 1, 1).astype(np.float32) for a in (ends[0], ends[1] - ends[0]))

    def refined(self, before: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Refined probabilities (K, I, J, K): background first, or a foreground alone. ``names`` of the foreground."""
        after = np.array(before, np.float32)
        slices, out = (np.moveaxis(a, self.axis + 1, 0) for a in (before, after))  # (slices, K, H, W), views
        first = min(1, len(before) - 1)
        busy = [n for n, s in enumerate(slices) if float(s[first:].max()) >= FOREGROUND]
        step = max(1, SLAB // max(1, slices[0, 0].size))
        parts = [busy[start : start + step] for start in range(0, len(busy), step)]
        volumes = np.zeros((2, len(names) + 1), np.int64)
        for part in parts:
            old = _all_labels(slices[part])
            new = self._marginals(part, old)
            volumes += [np.bincount(q.argmax(1).ravel(), minlength=len(names) + 1) for q in (old, new)]
            out[part] = new[:, -len(before) :]
        lost = (volumes[0] - volumes[1]) / np.maximum(volumes[0], 1)
        losers = [k for k in range(1, len(names) + 1) if lost[k] > self.parameters.largest_loss]
        for label in losers:
            warnings.warn(
                f"structure {names[label - 1]!r} would lose {lost[label]:.0%} of its volume and is kept unrefined; "
                "use weaker weights",
                stacklevel=3,
            )
        for part in parts if losers else []:
            own, new = (np.isin(_all_labels(a[part]).argmax(1), losers)[:, None] for a in (slices, out))
            out[part] = np.where(own | new, slices[part], out[part])
        return after

    def _marginals(self, part: list[int], q: np.ndarray) -> np.ndarray:
        """Marginals (slices, K, H, W) of some slices."""
        p = self.parameters
        unit = np.where(self.range > 0, self.range, 1) if p.bilateral_sigma_intensity is None else np.float32(1)
        intensity = np.clip(self.image[part].astype(np.float32) - self.low, 0, self.range) / unit
        found = dense_crf(
            torch.as_tensor(intensity, device=self.device),
            torch.as_tensor(q, device=self.device).clamp(p.clip, 1 - p.clip),
            gaussian_sigma_px=self.sigmas[0],
            gaussian_weight=p.gaussian_weight,
            bilateral_sigma_px=self.sigmas[1],
            bilateral_sigma_intensity=p.bilateral_sigma_intensity or p.bilateral_sigma_share,
            bilateral_weight=p.bilateral_weight,
            iterations=p.iterations,
        )
        return np.asarray(found.cpu())


def _all_labels(part: np.ndarray) -> np.ndarray:
    """Slices of a foreground alone (N, 1, H, W), or of all labels (N, K, H, W), as those of all labels."""
    part = np.ascontiguousarray(part, np.float32)
    return np.concatenate([1 - part, part], axis=1) if part.shape[1] == 1 else part
