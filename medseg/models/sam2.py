"""SAM 2 on the slices of a volume: prompts on any slice, followed through the others both ways.

The network is transformers' ``Sam2VideoModel`` (SAM 2 and 2.1); slices are given to it as arrays, one at a time, in place
of the frames of a film. Extra ``[sam2]``.

References
----------
Ravi et al. (2024), SAM 2: Segment Anything in Images and Videos, arXiv:2408.00714; Ma et al. (2025), MedSAM2,
arXiv:2504.03600, which follows an organ forwards and backwards from one slice in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SliceTracker", "load_sam2"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as SAM 2 was trained
CORNERS = (2, 3)  # labels of the corners of a box among those of points
ONLY = 0  # number of the object in its own session


def _transformers() -> Any:
    try:
        from transformers.models import sam2_video
    except ModuleNotFoundError as problem:
        raise ValueError("SAM 2 must have transformers, got none; pip install 'medseg[sam2]'") from problem
    return sam2_video


def load_sam2(source: str | Path, device: str | torch.device = "cpu") -> Any:
    """SAM 2 with its weights, in eval mode.

    Parameters
    ----------
    source : str or path
        A folder that transformers wrote (``config.json`` and ``model.safetensors``), or the id of such a model on the
        Hugging Face hub ("facebook/sam2.1-hiera-tiny"), which transformers downloads.
    device : str or torch.device
        Where it computes; in bfloat16 on a GPU that has it.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    ValueError
        If the model is another one, or transformers is not installed.
    """
    kind = _transformers().Sam2VideoModel
    where = torch.device(device)
    try:
        model, report = kind.from_pretrained(str(source), output_loading_info=True)
    except OSError as problem:
        raise FileNotFoundError(
            f"SAM 2 must be a folder with config.json and model.safetensors or an id on the hub, got {source}: "
            f"{str(problem)[:200]}"
        ) from problem
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise ValueError(
            f"weights must be of SAM 2 for videos, got {len(missing)} tensors missing in {source}: {missing[:3]}"
        )
    half = where.type == "cuda" and torch.cuda.is_bf16_supported()
    return model.to(where, torch.bfloat16 if half else torch.float32).eval()


@dataclass
class _Prompt:
    """What was drawn of an object on one slice, in pixels of the slice."""

    box: Tensor | None = None  # (4,)
    points: list[tuple[float, float, bool]] = field(default_factory=list)
    mask: Tensor | None = None  # (H, W) bool


class _Frames(Mapping[int, Tensor]):
    """Slices as the network takes them, each made when it is asked for: none is kept."""

    def __init__(self, slices: Tensor, size: int, dtype: torch.dtype) -> None:
        self.slices, self.size, self.dtype = slices, size, dtype

    def __getitem__(self, number: int) -> Tensor:
        image = self.slices[number].float()
        if image.ndim == 2:
            image = image.expand(3, -1, -1)
        square = F.interpolate(image[None], (self.size, self.size), mode="bilinear", antialias=True)[0].clamp(0, 1)
        return ((square - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).to(self.dtype)

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Any:
        return iter(range(len(self.slices)))


class SliceTracker:
    """Objects followed through the slices of a volume by SAM 2's memory.

    Parameters
    ----------
    model : Sam2VideoModel
        Of :func:`load_sam2`.
    slices : (N, H, W) or (N, 3, H, W) tensor of floats in 0..1
        In order. The caller cuts CT to a window; pixels should be square. The tensor stays where it is.
    state_device : str or torch.device
        Where memories of slices wait for their use: "cpu" spares the memory of a GPU.

    Notes
    -----
    Each object has a memory of its own: its masks do not depend on other objects, nor on the order in which prompts were
    given, and objects and prompts may be added, changed and removed at any time between two calls of :meth:`track`. The
    image encoder, which takes most of the time, sees a slice once per direction for all objects.

    Beyond the volume and the masks, memory is that of one slice and of the last 16 slices' memories of each object (at
    1024 pixels about 0.6 MB each), however many slices there are.
    """

    def __init__(self, model: Any, slices: Tensor, *, state_device: str | torch.device = "cpu") -> None:
        if slices.ndim not in (3, 4) or (slices.ndim == 4 and slices.shape[1] != 3) or not slices.numel():
            raise ValueError(f"slices must have the shape (N, H, W) or (N, 3, H, W), got {tuple(slices.shape)}")
        low, high = slices.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ValueError(f"slices must be finite and in 0 to 1, got {float(low):.3g} to {float(high):.3g}")
        self.model, self.slices = model, slices
        self.size = int(model.config.vision_config.backbone_config.image_size[0])
        self.state_device = torch.device(state_device)
        self.frames = _Frames(slices, self.size, model.dtype)
        config = model.config
        self.span = max(int(config.num_maskmem), int(config.max_object_pointers_in_encoder))
        self.prompts: dict[Hashable, dict[int, _Prompt]] = {}

    # -- prompts ------------------------------------------------------------------------------------------------------

    def add_box(self, name: Hashable, number: int, box: Sequence[float]) -> None:
        """A box x0, y0, x1, y1 (pixels, x along columns) of an object on a slice, in place of an earlier one there."""
        x0, y0, x1, y1 = (float(v) for v in box)
        height, width = self.slices.shape[-2:]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"box must be x0 < x1 and y0 < y1 in a slice of {width} x {height} pixels, got {list(box)}"
            )
        self._on(name, number).box = torch.tensor([x0, y0, x1, y1])

    def add_point(self, name: Hashable, number: int, x: float, y: float, *, inside: bool = True) -> None:
        """A point (pixels, x along columns) in an object on a slice, or outside of it; further ones add to it."""
        height, width = self.slices.shape[-2:]
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"point must lie in a slice of {width} x {height} pixels, got {x:g}, {y:g}")
        self._on(name, number).points.append((float(x), float(y), inside))

    def add_mask(self, name: Hashable, number: int, mask: Tensor) -> None:
        """The mask (H, W) of an object on a slice, in place of all that was given for it there."""
        if mask.shape != self.slices.shape[-2:] or not bool(mask.any()):
            raise ValueError(f"mask must be of {tuple(self.slices.shape[-2:])} and not empty, got {tuple(mask.shape)}")
        self._on(name, number)
        self.prompts[name][number] = _Prompt(mask=mask.bool())

    def remove(self, name: Hashable, number: int | None = None) -> None:
        """Forget an object, or what was given for it on one slice."""
        if name not in self.prompts or (number is not None and number not in self.prompts[name]):
            raise ValueError(f"object must have been prompted, got {name!r}{'' if number is None else f' on {number}'}")
        if number is not None:
            del self.prompts[name][number]
        if number is None or not self.prompts[name]:
            del self.prompts[name]

    def _on(self, name: Hashable, number: int) -> _Prompt:
        if not 0 <= number < len(self.slices):
            raise ValueError(f"slice must be from 0 to {len(self.slices) - 1}, got {number}")
        found = self.prompts.setdefault(name, {}).setdefault(number, _Prompt())
        found.mask = None
        return found

    # -- tracking -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def track(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[Hashable, Tensor]:
        """Masks (N, H, W) bool of all objects, on the CPU.

        Each object is followed from its first prompted slice to the last slice, then from there back to the first one;
        the second pass knows of the prompts and of none of the masks of the first, as if the volume were turned round.

        Parameters
        ----------
        progress : callable, optional
            Called with passes of slices done and of all.

        Raises
        ------
        ValueError
            If there is no prompt.
        """
        if not self.prompts:
            raise ValueError("object must be prompted before it is tracked, got no prompt")
        count = len(self.slices)
        masks = {n: torch.zeros((count, *self.slices.shape[-2:]), dtype=torch.bool) for n in self.prompts}
        shared = self._session().cache
        sessions = {name: self._prompted(prompts, shared) for name, prompts in self.prompts.items()}
        first = {name: min(prompts) for name, prompts in self.prompts.items()}
        order = [(n, False) for n in range(min(first.values()), count)]
        order += [(n, True) for n in range(max(first.values()) - 1, -1, -1)]
        turned = False
        for done, (number, back) in enumerate(order, start=1):
            if back and not turned:
                for session in sessions.values():
                    _forget(session, lambda n: True)
                turned = True
            for name, session in sessions.items():
                if back == (number < first[name]):
                    masks[name][number] = self._step(session, number, back)
            progress(done, len(order))
        return masks

    def _session(self) -> Any:
        """A session of transformers for one object, whose slices are ours."""
        kind = _transformers().modeling_sam2_video.Sam2VideoInferenceSession
        height, width = self.slices.shape[-2:]
        session = kind(
            video_height=height,
            video_width=width,
            inference_device=self.model.device,
            inference_state_device=self.state_device,
            video_storage_device=self.slices.device,
            dtype=self.model.dtype,
        )
        session.processed_frames = self.frames
        session.obj_id_to_idx(ONLY)
        return session

    def _prompted(self, prompts: Mapping[int, _Prompt], cache: Any) -> Any:
        """A session that knows the prompts of an object; ``cache`` holds the last slice's features for all of them."""
        session = self._session()
        session.cache = cache
        for number, prompt in sorted(prompts.items()):
            if prompt.mask is not None:
                size = (self.size, self.size)
                square = F.interpolate(prompt.mask[None, None].float(), size, mode="bilinear", antialias=True)
                session.add_mask_inputs(ONLY, number, (square >= 0.5).float())
            else:
                session.add_point_inputs(ONLY, number, self._points(prompt))
            session.obj_with_new_inputs = [ONLY]
            self._step(session, number, False)
        return session

    def _points(self, prompt: _Prompt) -> dict[str, Tensor]:
        """Corners of the box and points, in pixels of the network's square."""
        height, width = self.slices.shape[-2:]
        corners = [] if prompt.box is None else prompt.box.view(2, 2).tolist()
        places = torch.tensor([*corners, *((x, y) for x, y, _ in prompt.points)])
        labels = [*CORNERS[: len(corners)], *(int(inside) for _, _, inside in prompt.points)]
        scaled = places * torch.tensor([self.size / width, self.size / height])
        return {
            "point_coords": scaled.view(1, 1, -1, 2).to(self.model.dtype),
            "point_labels": torch.tensor(labels, dtype=torch.int32).view(1, 1, -1),
        }

    def _step(self, session: Any, number: int, back: bool) -> Tensor:
        """Mask (H, W) of the object of a session on a slice; what lies too far back to be used is forgotten."""
        found = self.model(session, frame_idx=number, reverse=back)
        for outputs in session.output_dict_per_obj[ONLY].values():
            for output in outputs.values():
                output.pop("high_res_masks", None)  # kept by transformers for nothing: 4 MB a slice
        _forget(session, lambda n: abs(n - number) > self.span)
        logits = F.interpolate(found.pred_masks.float(), self.slices.shape[-2:], mode="bilinear", align_corners=False)
        return (logits[0, 0] > 0).cpu()


def _forget(session: Any, which: Callable[[int], bool]) -> None:
    """Drop memories of slices that were not prompted."""
    for kept in (session.output_dict_per_obj[ONLY]["non_cond_frame_outputs"], session.frames_tracked_per_obj[ONLY]):
        for number in [n for n in kept if which(n)]:
            del kept[number]
