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
from medseg.volume import GeometryError, LabelMap, Volume

__all__ = ["CRFParameters", "dense_crf", "refine"]

CLIP = 1e-5  # least probability of the unary energies
CERTAIN, AROUND = 0.99, 3  # after the first step only pixels below this probability, and those so near (px), move
SLAB = 1 << 20  # pixels of the slices refined together
FOREGROUND = 0.01  # slices whose foreground stays below this probability are left as they are


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def dense_crf(
    image: Tensor,
    probabilities: Tensor,
    *,
    gaussian_sigma_px: float | Sequence[float] = 3.0,
    gaussian_weight: float = 3.0,
    bilateral_sigma_px: float | Sequence[float] = 80.0,
    bilateral_sigma_intensity: float = 13.0,
    bilateral_weight: float = 10.0,
    iterations: int = 5,
) -> Tensor:
    """Mean-field marginals of the dense CRF of each image of a batch.

    Parameters
    ----------
    image : (N, C, H, W) tensor
        Images of C = 1 to 3 channels; the intensity distance is Euclidean over the channels.
    probabilities : (N, K, H, W) tensor of float
        Probabilities of K >= 2 labels; clipped to at least 1e-5.
    gaussian_sigma_px, bilateral_sigma_px : float or (float, float) (pixels)
        Spatial standard deviations, of one length or along H and W. The defaults are those of pydensecrf's examples:
        they smooth strongly and can erase small structures.
    bilateral_sigma_intensity : float (units of the image)
        Standard deviation in intensity.
    gaussian_weight, bilateral_weight : float
        Weights of the kernels; 0 leaves one out.
    iterations : int
        Steps of the mean field.

    Returns
    -------
    (N, K, H, W) tensor of float32
        Marginals; they sum to 1 over K.

    Raises
    ------
    ValueError
        If shapes do not fit, a parameter is out of range, an input is not finite, or the bilateral grid would have more
        than 2^26 nodes.

    Notes
    -----
    The Gaussian kernel is exact to 4e-5. The bilateral kernel is interpolated linearly from a grid with three nodes per
    sigma in space and two in intensity, narrowed so that its variance is right: of the exact marginals it misses a few
    hundredths at worst. After the first step only pixels below 0.99, and those within 3 pixels of one, still move: the
    others would change by less than that error. Time and memory grow with N K H W and with the nodes of the grid, which
    grow with the power of the number of channels.
    """
    image, probabilities = _checked(image, probabilities)
    sigmas = [_pair(gaussian_sigma_px, "gaussian_sigma_px"), _pair(bilateral_sigma_px, "bilateral_sigma_px")]
    if not bilateral_sigma_intensity > 0:
        raise ValueError(f"bilateral_sigma_intensity must be positive, got {bilateral_sigma_intensity}")
    if iterations < 0 or gaussian_weight < 0 or bilateral_weight < 0:
        raise ValueError(
            f"iterations and weights must not be negative, got {iterations}, {gaussian_weight}, {bilateral_weight}"
        )
    gaussian = Gaussian(image, sigmas[0]) if gaussian_weight else None
    bilateral = Bilateral(image, sigmas[1], bilateral_sigma_intensity) if bilateral_weight else None

    n, k, h, w = probabilities.shape
    logits = probabilities.clamp(CLIP, 1).log().transpose(0, 1).reshape(k, n * h * w)
    if k == 2:
        logits = logits[:1] - logits[1:]
    q = _marginals(logits)
    if iterations:
        # The labels sum to 1, so the message of the last one follows from the others and that of a constant.
        first = _carried(q)
        m = torch.zeros(len(first) + 1, n * h * w, device=q.device)
        both = torch.cat([first, torch.ones_like(first[:1])])
        m = m + (gaussian_weight * gaussian(both) if gaussian else 0)
        m = m + (bilateral_weight * bilateral(both) if bilateral else 0)
        constant = m[-1:]
        q = _marginals(logits, m[:-1], constant)
    if iterations > 1:
        where = _uncertain(q, (n, h, w))
        far = bilateral.focus(_carried(q), where) if bilateral else None
        logits, constant = logits[:, where], constant[:, where]
        for _ in range(iterations - 1):
            m = gaussian_weight * gaussian(_carried(q))[:, where] if gaussian else torch.zeros_like(_carried(logits))
            m = m + (bilateral_weight * far(_carried(q)[:, where]) if far else 0)
            q = q.index_copy(1, where, _marginals(logits, m, constant))
    q = torch.cat([q, 1 - q]) if k == 2 else q
    return q.reshape(k, n, h, w).transpose(0, 1).contiguous()


def _carried(q: Tensor) -> Tensor:
    """The labels whose messages are worked out: one of two, all but the last of more."""
    return q if len(q) == 1 else q[:-1]


def _marginals(logits: Tensor, message: Tensor | None = None, constant: Tensor | None = None) -> Tensor:
    """Q (K, P), or (1, P) of the first of two labels, from logits (theirs, or the difference) and messages."""
    if message is None or constant is None:
        return logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
    if len(logits) == 1:
        return (logits + 2 * message - constant).sigmoid()
    return (logits + torch.cat([message, constant - message.sum(0, keepdim=True)])).softmax(0)


def _uncertain(q: Tensor, pixels: tuple[int, int, int]) -> Tensor:
    """Pixels, as flat indices, whose label is not certain yet, and their surroundings: only these still move."""
    best = torch.maximum(q[0], 1 - q[0]) if len(q) == 1 else q.detach().amax(0)
    open_ = (best.detach() < CERTAIN).view(pixels).float()[:, None]
    for kernel in ((2 * AROUND + 1, 1), (1, 2 * AROUND + 1)):
        open_ = torch.nn.functional.max_pool2d(open_, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
    return open_.flatten().nonzero()[:, 0]


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
    if not 1 <= image.shape[1] <= 3:
        raise ValueError(f"image must have 1 to 3 channels, got {image.shape[1]}; choose the telling ones")
    if image.device != probabilities.device:
        raise ValueError(f"both must be on one device, got {image.device} and {probabilities.device}")
    image, probabilities = image.detach().float(), probabilities.float()
    for name, values in (("image", image), ("probabilities", probabilities)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return image, probabilities


def _pair(sigma: float | Sequence[float], name: str) -> tuple[float, float]:
    a, b = (sigma, sigma) if isinstance(sigma, int | float) else sigma
    if not (0 < a < float("inf") and 0 < b < float("inf")):
        raise ValueError(f"{name} must be positive, got {sigma}")
    return float(a), float(b)


# ---------------------------------------------------------------------------------------------------------------------
# Volumes


@dataclass(frozen=True)
class CRFParameters:
    """Parameters of the CRF on a volume, in mm and shares of the image's own range.

    The defaults are gentle: they straighten blocky or noisy borders of masks made at low resolution. Sub-voxel
    probabilities of a good model are best left alone: use the CRF where validation shows a gain.

    Parameters
    ----------
    gaussian_sigma_mm, bilateral_sigma_mm : float (mm)
        Spatial standard deviations, divided by the spacing of each in-plane axis.
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
    """

    gaussian_sigma_mm: float = 1.0
    gaussian_weight: float = 1.0
    bilateral_sigma_mm: float = 6.0
    bilateral_sigma_share: float = 13 / 255
    bilateral_weight: float = 1.0
    iterations: int = 5
    clip: float = 1e-3
    largest_loss: float = 0.3
    pydensecrf: ClassVar[CRFParameters]

    def __post_init__(self) -> None:
        for name in ("gaussian_sigma_mm", "bilateral_sigma_mm", "bilateral_sigma_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gaussian_weight", "bilateral_weight", "iterations"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.clip < 0.5 or not 0 <= self.largest_loss <= 1:
            raise ValueError(
                f"clip must be in (0, 0.5) and largest_loss in [0, 1], got {self.clip} and {self.largest_loss}"
            )


# The examples of pydensecrf at 1 mm. On masks of organs and tumours they erase more than they mend.
CRFParameters.pydensecrf = CRFParameters(3.0, 3.0, 80.0, 13 / 255, 10.0, 5, CLIP, 1.0)

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
        The image, C = 1 to 3 channels.
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
    number of slices.
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
        after = work.refined(before)
        _keep_losers(before, after, parameters.largest_loss)
        return replace(probabilities, array=after)
    after = np.empty(before.shape, np.float32)
    for s, layer in enumerate(before):
        pair = work.refined(np.stack([1 - layer.astype(np.float32), layer]))
        names = [probabilities.structures[s].name] if isinstance(probabilities, LabelMap) else None
        _keep_losers(np.stack([1 - layer.astype(np.float32), layer]), pair, parameters.largest_loss, names)
        after[s] = pair[1]
    return replace(probabilities, array=after)


class _Slices:
    """An image cut into slices, normalised, on which probabilities are refined slab by slab."""

    def __init__(
        self, image: Volume, parameters: CRFParameters, axis: int, spacing: Sequence[float], device: torch.device
    ) -> None:
        self.parameters, self.axis, self.device = parameters, axis, device
        self.sigmas = [
            tuple(mm / s for s in spacing) for mm in (parameters.gaussian_sigma_mm, parameters.bilateral_sigma_mm)
        ]
        self.image = np.moveaxis(np.asarray(image.array), axis + 1, 0)  # (slices, C, H, W)
        sample = image.array[(slice(None), *(slice(None, None, max(1, n // 128)) for n in image.geometry.shape))]
        if not np.isfinite(sample).all():
            raise ValueError("image must be finite, got NaN or infinity")
        ends = np.percentile(sample, (0.5, 99.5), axis=(1, 2, 3))
        self.low, self.range = (a.reshape(-1, 1, 1).astype(np.float32) for a in (ends[0], ends[1] - ends[0]))

    def refined(self, before: np.ndarray) -> np.ndarray:
        """Refined probabilities (K, I, J, K), background first."""
        after = np.array(before, np.float32)
        slices, out = (np.moveaxis(a, self.axis + 1, 0) for a in (before, after))  # (slices, K, H, W), views
        busy = [n for n, s in enumerate(slices) if float(s[1:].max()) >= FOREGROUND]
        step = max(1, SLAB // max(1, slices[0, 0].size))
        p = self.parameters
        for start in range(0, len(busy), step):
            part = busy[start : start + step]
            intensity = (self.image[part].astype(np.float32) - self.low) / np.where(self.range > 0, self.range, 1)
            q = torch.as_tensor(np.ascontiguousarray(slices[part], np.float32), device=self.device)
            out[part] = dense_crf(
                torch.as_tensor(np.clip(intensity, 0, 1), device=self.device),
                q.clamp(p.clip, 1 - p.clip),
                gaussian_sigma_px=self.sigmas[0],
                gaussian_weight=p.gaussian_weight,
                bilateral_sigma_px=self.sigmas[1],
                bilateral_sigma_intensity=p.bilateral_sigma_share,
                bilateral_weight=p.bilateral_weight,
                iterations=p.iterations,
            ).cpu()
        return after


def _keep_losers(
    before: np.ndarray, after: np.ndarray, largest_loss: float, names: Sequence[str] | None = None
) -> None:
    """Put back, in place, the voxels of structures that lost too much."""
    old, new = before.argmax(0), after.argmax(0)
    for label in range(1, len(before)):
        own = old == label
        volume = int(np.count_nonzero(own))
        left = int(np.count_nonzero(new == label))
        if volume - left > largest_loss * volume:
            after[:, own] = before[:, own]
            name = names[label - 1] if names else f"label {label}"
            warnings.warn(
                f"structure {name!r} would lose {(volume - left) / volume:.0%} of its volume and is kept unrefined; "
                "use weaker weights",
                stacklevel=3,
            )
