"""Structures on the slices of prepared cases as prompts: their pictures, boxes and masks, and what a model draws.

Everything is on the planned grid, slice by slice along its last axis. A slice is shown with rows along J and columns
along I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.boxes import box_of
from medseg.embeddings import EmbeddingCache, embedding_key
from medseg.evaluation import score_case
from medseg.models.sam import PromptableModel
from medseg.plan import Plan
from medseg.prepared import PreparedCase
from medseg.volume import LabelMap

__all__ = [
    "MIN_PIXELS",
    "BoxModel",
    "Prompt",
    "jittered",
    "picture",
    "prompts_of",
    "rows_of",
    "spread",
]

MIN_PIXELS = 10  # of a structure on a slice to be prompted for
JITTER = 20 / 1024  # of the longest side: by so much each side of a box may lie outside of the structure
OUTER = torch.tensor([0.0, 0, 1, 1])  # from the outermost pixels of a structure to their outer edges, as prompts are
AT_ONCE = 8  # prompts that are decoded together


def picture(image: np.ndarray) -> Tensor:
    """What a promptable model sees of a slice (C, I, J): (3, J, I) in 0..1, each channel stretched to 8 bits.

    Rows of the picture run along J, columns along I: planes are stored with the column first.
    """
    low, high = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    scaled = np.round((image - low) / np.maximum(high - low, 1e-6) * 255).astype(np.float32) / 255
    return torch.from_numpy(scaled[[n % len(scaled) for n in range(3)]].transpose(0, 2, 1).copy())


@dataclass(frozen=True)
class Prompt:
    """One structure on one slice of a case."""

    case: PreparedCase
    slice: int
    structure: int  # from 0, in the order of the plan

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Slice (C, I, J) and mask (J, I)."""
        shape = self.case.geometry.shape
        image, label = self.case.window((0, 0, self.slice), (shape[0], shape[1], self.slice + 1))
        layered = label.ndim == 4
        mask = label[self.structure] >= 0.5 if layered else label == self.structure + 1
        return image[..., 0].astype(np.float32), mask[..., 0].T.copy()


def prompts_of(cases: Sequence[PreparedCase]) -> list[Prompt]:
    """Every structure on every slice of cases, where it is large enough and was drawn, slice by slice."""
    found = []
    for case in cases:
        label = case.label
        layers = [label[n] >= 0.5 if label.ndim == 4 else label == n + 1 for n in range(len(case.known))]
        counts = np.stack([layer.sum((0, 1)) for layer in layers])
        found += [
            Prompt(case, int(k), int(n)) for k, n in np.argwhere(counts.T >= MIN_PIXELS).tolist() if case.known[n]
        ]
    return found


def spread(prompts: Sequence[Prompt], slices: int) -> list[Prompt]:
    """The prompts on so many slices, spread evenly over all of them."""
    by_slice = [list(group) for _, group in groupby(prompts, lambda p: (p.case.id, p.slice))]
    places = np.linspace(0, len(by_slice) - 1, min(slices, len(by_slice))).round().astype(int)
    return [prompt for n in dict.fromkeys(places.tolist()) for prompt in by_slice[n]]


def jittered(box: np.ndarray, size: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """A box whose sides lie up to 20 pixels of 1024 further out, as those that a reader draws do."""
    height, width = size
    out = random.uniform(0, JITTER * max(size), 4).astype(np.float32)
    moved = box + out * np.array([-1, -1, 1, 1], np.float32)
    return np.clip(moved, 0, np.array([width - 1, height - 1] * 2)).astype(np.float32)


@dataclass
class BoxModel:
    """A promptable model on slices whose embeddings are kept."""

    model: PromptableModel
    cache: EmbeddingCache
    device: torch.device
    keys: dict[tuple[Path, int], str] = field(default_factory=dict)  # of slices that were embedded

    def embedding(self, prompt: Prompt) -> Tensor:
        """Embedding (256, h, h) of the slice of a prompt, float16 on the CPU."""
        place = (prompt.case.file.path, prompt.slice)
        if place not in self.keys:
            image = (picture(prompt.read()[0]).numpy() * 255).round().astype(np.uint8)
            self.keys[place] = embedding_key(image, self.model.fingerprint, None, self.model.size)
        return self.cache.get(self.keys[place], lambda: self._encode(prompt))

    def _encode(self, prompt: Prompt) -> Tensor:
        return self.model.encode(picture(prompt.read()[0])[None].to(self.device))[0]

    def decode(
        self, prompts: Sequence[Prompt], boxes: Sequence[np.ndarray], sizes: Sequence[tuple[int, ...]]
    ) -> tuple[list[Tensor], Tensor]:
        """Logits (1, 1, rows, columns) of each prompt on its slice, and predicted IoU (N,)."""
        embeddings = torch.stack([self.embedding(p) for p in prompts]).to(self.device).float()
        edges = [torch.from_numpy(box) + OUTER for box in boxes]
        square = [self.model.on_square(b, s) for b, s in zip(edges, sizes, strict=True)]
        sparse, dense = self.model.prompt_encoder(None, torch.stack(square).to(self.device), None)
        low, iou = self.model.masks(embeddings, sparse, dense, tokens=1)
        return [self.model.on_image(one[None], s) for one, s in zip(low, sizes, strict=True)], iou[:, 0]

    @torch.no_grad()
    def predicted(self, prompts: Sequence[Prompt]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Predicted and true mask (rows, columns) of each prompt, with exact boxes."""
        self.model.eval()
        pairs = []
        for start in range(0, len(prompts), AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            masks = [p.read()[1] for p in part]
            logits, _ = self.decode(part, [box_of(m) for m in masks], [m.shape for m in masks])
            pairs += [((logit[0, 0] > 0).cpu().numpy(), m) for logit, m in zip(logits, masks, strict=True)]
        return pairs


def rows_of(
    prompts: Sequence[Prompt], pairs: Sequence[tuple[np.ndarray, np.ndarray]], plan: Plan
) -> list[dict[str, Any]]:
    """Metrics per case and structure of predicted and true masks; slices without a prompt are empty on both sides."""
    structures, rows = plan.as_structures(), []
    for case, group in groupby(zip(prompts, pairs, strict=True), lambda both: both[0].case):
        layers, known = np.zeros((2, len(structures), *case.geometry.shape), bool), set()
        for prompt, pair in group:
            known.add(structures[prompt.structure].number)
            for layer, mask in zip(layers, pair, strict=True):
                layer[prompt.structure, :, :, prompt.slice] = mask.T
        found, true = (LabelMap(layer, case.geometry, structures) for layer in layers)
        rows += score_case(case.id, found, true, known=known)
    return rows
