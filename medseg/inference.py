"""Prediction: a run and an image in, a label map on the image's own grid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.crf import CRFParameters, refine
from medseg.decision import decide, probabilities_on
from medseg.device import pick_device
from medseg.io import read, read_channels
from medseg.plan import Plan
from medseg.run import Run
from medseg.sliding_window import Slab, sliding_logits_slabs
from medseg.transforms import preprocessing
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["Predictor", "predict"]

Image = str | PathLike[str] | Volume | Sequence[str | PathLike[str]]
SURE = 10.0  # logit of the background, and minus that of the structures, where there is nothing to see
CONTRAST = 0.05  # standard deviations above the lowest value from which there is something to see
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}


@dataclass(frozen=True)
class Predictor:
    """A loaded model that predicts image after image.

    Parameters
    ----------
    plan : Plan
        How images are preprocessed and what the channels of the logits mean.
    network : nn.Module
        In eval mode, on ``device``.
    device : torch.device
    precision : str
        "32-true", "bf16-mixed" or "16-mixed".
    """

    plan: Plan
    network: nn.Module
    device: torch.device
    precision: str = "32-true"

    @classmethod
    def load(cls, run: Run | str | PathLike[str], device: str = "auto") -> Predictor:
        """Load the best weights of a run.

        Raises
        ------
        FileNotFoundError, ValueError
            If the folder is not a finished run of this version, or the device is not there.
        """
        run = run if isinstance(run, Run) else Run.open(Path(run))
        where = pick_device(device)
        memory = torch.channels_last if run.plan.dims == 2 else torch.channels_last_3d
        network = run.network(where).to(memory_format=memory)  # type: ignore[call-overload]
        half = where.type == "cuda"
        precision = ("bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed") if half else "32-true"
        return cls(run.plan, network, where, precision)

    def predict(
        self,
        image: Volume,
        *,
        probabilities: bool = False,
        crf: CRFParameters | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[LabelMap, Volume | None]:
        """Label map of an image on its own grid and, where asked for, the probabilities (K, I, J, K) it comes from.

        Channel 0 of the probabilities is the background. Without them and without CRF memory is that of the
        preprocessed image, a few patches of logits and the result; with them, K times the image in float32. Time grows
        with the voxels.
        """
        data: dict[Any, Any] = preprocessing(self.plan)({"image": image})
        array, planned = data["image"].numpy(), data["geometry"]
        if not (probabilities or crf):
            labels = self.from_prepared(array, planned, image.geometry, progress)
            return replace(labels, meta=image.meta), None
        soft = Volume(probabilities_on(self._slabs(array, progress), planned, image.geometry).numpy(), image.geometry)
        if crf:
            soft = refine(image, soft, parameters=crf, device=str(self.device))
        labels = self.label_map(np.asarray(soft.array).argmax(0), image.geometry)
        return replace(labels, meta=image.meta), soft if probabilities else None

    def from_prepared(
        self,
        array: np.ndarray,
        planned: Geometry,
        native: Geometry,
        progress: Callable[[int, int], None] | None = None,
    ) -> LabelMap:
        """Label map on the native grid of an image (C, I, J, K) that is already preprocessed on the planned grid."""
        classes = decide(self._slabs(array, progress), planned, native).numpy()
        return self.label_map(classes, native)

    def label_map(self, classes: np.ndarray, geometry: Geometry) -> LabelMap:
        """Label map with the numbers of the structures in place of class indices."""
        structures = self.plan.as_structures()
        numbers = np.array([0, *(s.number for s in structures)])
        return LabelMap(numbers.astype(np.min_scalar_type(int(numbers.max())))[classes], geometry, structures)

    def _slabs(self, array: np.ndarray, progress: Callable[[int, int], None] | None) -> Iterator[Slab]:
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        batch = 1 if self.plan.dims == 3 else min(8, tensor.shape[3])
        floor = tensor.amin((1, 2, 3)).to(self.device)
        return sliding_logits_slabs(
            partial(self._forward, floor=floor), tensor, self.plan.patch, batch=batch, device=self.device,
            autocast=AUTOCAST[self.precision], progress=progress,
        )  # fmt: skip

    def _forward(self, windows: Tensor, floor: Tensor) -> Tensor:
        """Logits of windows (B, C, *patch).

        Where images are blank around the body (the plan knows) a voxel whose surroundings are all blank is background,
        and a window of such voxels is not put to the network, which would make structures out of nothing.
        """
        memory = torch.channels_last if self.plan.dims == 2 else torch.channels_last_3d
        if not all(c.masked for c in self.plan.channels):
            whole: Tensor = self.network(windows.to(memory_format=memory))
            return whole
        blank = _blank(windows, floor)
        seen = ~blank.flatten(1).all(1)
        logits = windows.new_zeros((len(windows), len(self.plan.structures) + 1, *windows.shape[2:]))
        if bool(seen.any()):
            logits[seen] = self.network(windows[seen].to(memory_format=memory)).to(logits.dtype)
        logits.masked_fill_(blank[:, None], -SURE)
        logits[:, 0].masked_fill_(blank, SURE)
        return logits


def _blank(windows: Tensor, floor: Tensor) -> Tensor:
    """(B, *S) mask of the voxels of (B, C, *S) images that hold the lowest values (C,) of the whole image all around.

    All around is 5 voxels a side. A bright or grey area without contrast is not blank.
    """
    high = windows
    for axis in range(2, windows.ndim):
        size = [1] * (windows.ndim - 2)
        size[axis - 2] = 5
        pool = F.max_pool2d if windows.ndim == 4 else F.max_pool3d
        high = pool(high, size, 1, [n // 2 for n in size])
    return (high - floor.view(1, -1, *[1] * (windows.ndim - 2))).amax(1) < CONTRAST


def predict(
    run: Run | Predictor | str | PathLike[str],
    image: Image,
    *,
    crf: bool | CRFParameters = False,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> LabelMap:
    """Predict the structures of one image.

    Parameters
    ----------
    run : Run, Predictor or path
        A run folder; a :class:`Predictor` saves loading it again for many images.
    image : path, Volume, or sequence of paths
        A file or DICOM series; several paths are the channels of one image, in the order of training.
    crf : bool or CRFParameters
        Refine the probabilities slice by slice before the decision, with gentle defaults or the parameters given.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".
    progress : callable, optional
        Called with the number of windows done and of all windows.

    Returns
    -------
    LabelMap
        Exactly on the grid of the image.

    Raises
    ------
    FileNotFoundError, ValueError
        If the run or the image cannot be read, or the image has other channels than the plan.
    """
    predictor = run if isinstance(run, Predictor) else Predictor.load(run, device)
    volume = load_image(image)
    parameters = CRFParameters() if crf is True else crf or None
    return predictor.predict(volume, crf=parameters, progress=progress)[0]


def load_image(image: Image) -> Volume:
    """A Volume of a path, a sequence of channel paths, or a Volume."""
    if isinstance(image, Volume):
        return image
    if isinstance(image, str | PathLike):
        return read(image)
    return read_channels(list(image))
