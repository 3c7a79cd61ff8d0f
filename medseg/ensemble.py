"""Several networks as one: the runs of a cross-validation, and the mean of their probabilities."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.config import Record
from medseg.run import Run

__all__ = ["Ensemble", "Fold", "Members", "Mirrored", "is_ensemble", "member_runs"]

log = logging.getLogger("medseg")


class Fold(Record):
    """One finished fold: the name of its folder, its validation cases, and their mean metrics."""

    name: str
    cases: int
    iou: float | None
    dice: float | None


class Ensemble(Record):
    """The folds of a cross-validation that are averaged, and why others are missing."""

    file: ClassVar[str] = "ensemble.json"
    folds: tuple[Fold, ...]
    failed: Mapping[str, str] = {}


def _fold_folders(path: Path) -> list[Path]:
    found = [p for p in path.glob("fold*") if p.name[4:].isdigit() and (p / "plan.json").is_file()]
    return sorted(found, key=lambda p: int(p.name[4:]))


def is_ensemble(path: str | PathLike[str]) -> bool:
    """Whether a folder holds the runs of folds (``fold0``, ``fold1`` ...) and no weights of its own."""
    path = Path(path)
    return not (path / "weights.safetensors").is_file() and bool(_fold_folders(path))


def member_runs(path: str | PathLike[str]) -> list[Run]:
    """The finished runs of the folds in a folder; of an ordinary run, itself.

    Raises
    ------
    FileNotFoundError, ValueError
        If no fold has finished, or the folder is neither.
    """
    path = Path(path)
    if not is_ensemble(path):
        return [Run.open(path)]
    record = path / Ensemble.file
    if record.is_file():
        return [Run.open(path / fold.name) for fold in Ensemble.load(record).folds]
    folders = _fold_folders(path)
    finished = [p for p in folders if (p / "metrics.json").is_file()]
    if not finished:
        raise FileNotFoundError(f"folds must have finished, got none that has in {path}; go on with --resume")
    if len(finished) < len(folders):
        log.warning("%d of %d folds have finished and are used", len(finished), len(folders))
    return [Run.open(p) for p in finished]


class Members(nn.Module):
    """Networks as one: the logits of the mean of their probabilities, each at the same temperature.

    The mean of probabilities [1]_, not of logits: it is nnU-Net's rule between configurations, calibrated members stay
    comparable, and no member that is much too certain outvotes the others. It is taken window by window, so that memory
    grows with the networks' weights alone.

    Parameters
    ----------
    networks : sequence of nn.Module
        Each maps (B, C, *S) to logits (B, K, *S).
    overlapping : bool
        Whether each channel has a sigmoid of its own, instead of a softmax over all.
    temperature : float
        Divides the logits of each member: what was fitted on members, which saw the cases that another did not.

    References
    ----------
    .. [1] Lakshminarayanan et al., Deep ensembles, NeurIPS 2017, doi:10.48550/arXiv.1612.01474
    """

    def __init__(self, networks: Sequence[nn.Module], overlapping: bool = False, temperature: float = 1.0) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.overlapping, self.temperature = overlapping, temperature

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, *S); float32 where there are several networks."""
        if len(self.networks) == 1:
            alone: Tensor = self.networks[0](image)
            return alone if self.temperature == 1 else alone / self.temperature
        total, others = None, None
        for network in self.networks:
            logits = network(image).float() / self.temperature
            of, against = (F.logsigmoid(logits), F.logsigmoid(-logits)) if self.overlapping else (logits, None)
            of = of if self.overlapping else torch.log_softmax(of, 1)
            total = of if total is None else torch.logaddexp(total, of)
            if against is not None:
                others = against if others is None else torch.logaddexp(others, against)
        if total is None:
            raise ValueError("networks must be at least one, got none")
        return total if others is None else total - others


class Mirrored(nn.Module):
    """A network that sees the mirror image: its logits, mirrored back, with left and right structures in their places.

    Averaged with the network itself it halves what is wrong on one side alone; only sensible where training mirrored too.

    Parameters
    ----------
    network : nn.Module
        Maps (B, C, *S) to logits (B, K, *S).
    axes : sequence of int
        Axes of S that are mirrored.
    order : sequence of K int
        The channel that each channel of the mirror image's logits stands for.
    """

    def __init__(self, network: nn.Module, axes: Sequence[int], order: Sequence[int]) -> None:
        super().__init__()
        self.network, self.axes, self.order = network, [a + 2 for a in axes], list(order)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, *S)."""
        logits: Tensor = self.network(image.flip(self.axes))
        return logits.flip(self.axes)[:, self.order]
