"""Training of a decoder on a frozen encoder: whole slices as they are, so that each is embedded once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medseg.config import TrainConfig
from medseg.embeddings import EmbeddingCache
from medseg.finetuning import AUTOMATIC, RATE
from medseg.learner import Batch, Learner
from medseg.models.sam_med import embeddings_kept
from medseg.network_plan import parse_bytes
from medseg.patches import FOREGROUND_SHARE, choose_place
from medseg.plan import Plan
from medseg.prepared import PreparedCase

__all__ = ["SamLearner", "embedding_once"]


@contextmanager
def embedding_once(config: TrainConfig, plan: Plan, folder: Path) -> Iterator[None]:
    """While the block runs, a network of the plan whose encoder is frozen takes what it embedded before from a folder."""
    if plan.model != AUTOMATIC:
        yield
        return
    cache = EmbeddingCache(folder / "embeddings", parse_bytes(config.cache_size))
    with embeddings_kept(cache.get):
        yield


class SamLearner(Learner):
    """The state of a training whose batches are whole slices without augmentation.

    Slices are drawn like patches: half of them on a structure. Those of one batch have the same size, of one case or of
    several. The decoder has learnt before: the learning rate is a tenth of the configured one.
    """

    def __post_init__(self) -> None:
        self.config = self.config.model_copy(update={"learning_rate": self.config.learning_rate * RATE})
        super().__post_init__()
        self.augmentation = _unchanged  # type: ignore[assignment]

    def _draw(self, step: int) -> Batch:
        return draw_slices(self.training, self.run.plan, self.batch, self.config.seed, step)


def draw_slices(cases: Sequence[PreparedCase], plan: Plan, batch: int, seed: int, step: int) -> Batch:
    """Whole slices of one size: images (B, C, I, J), labels (B, I, J) or (B, S, I, J), and known (B, S).

    A function of seed and step alone, as :func:`medseg.patches.draw_batch` is.
    """
    random = np.random.default_rng([seed, step])
    first = cases[int(random.integers(len(cases)))]
    alike = [c for c in cases if c.geometry.shape[:2] == first.geometry.shape[:2]]
    images, labels, known = [], [], []
    for _ in range(batch):
        case, place = choose_place(alike, plan, bool(random.random() < FOREGROUND_SHARE), random)
        k = int(random.integers(case.geometry.shape[2])) if place is None else int(place[2])
        image, label = case.window((0, 0, k), (*case.geometry.shape[:2], k + 1))
        images.append(torch.from_numpy(image[..., 0].astype(np.float32)))
        labels.append(torch.from_numpy(label[..., 0].astype(np.float32 if case.soft else np.int64)))
        known.append(case.known)
    return torch.stack(images), torch.stack(labels), torch.tensor(known)


def _unchanged(images: Tensor, labels: Tensor, known: Tensor, generator: torch.Generator) -> Batch:
    return images, labels, known
