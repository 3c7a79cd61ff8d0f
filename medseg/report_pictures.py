"""Pictures for reports: three planes of a scan with contours, and the training curve. PNG bytes, no display needed."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray

from medseg.contours import bounding_box, mask_to_polygons
from medseg.resample import reorient
from medseg.volume import Geometry, LabelMap, Structure, Volume, union

__all__ = ["curve_picture", "overview_picture", "planes_picture"]

Array = NDArray[Any]
Focus = Literal["area", "disagreement"]

DARK, PALE = "#0d1117", "#d8dee6"
GREY = "#7d8794"  # readable on white and on black
CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")  # no patient, so no letters
PANEL_IN, DPI = 3.4, 150  # height of a plane in inches


@dataclass(frozen=True)
class _View:
    """How a plane of a grid whose axes run to R, A and S is shown: axes, directions and letters of the screen."""

    across: int
    down: int
    through: int
    left: str
    right: str
    top: str
    bottom: str


# Radiological: the patient's right is on the viewer's left, as if seen from the feet or from the front.
_VIEWS = (_View(0, 1, 2, "R", "L", "A", "P"), _View(0, 2, 1, "R", "L", "S", "I"), _View(1, 2, 0, "A", "P", "S", "I"))


def planes_picture(
    image: Volume,
    prediction: LabelMap,
    reference: LabelMap | None = None,
    *,
    focus: Focus = "area",
    window: tuple[float, float] | None = None,
    channel: int = 0,
    zoom: bool = False,
    fill: bool = False,
) -> bytes:
    """Axial, coronal and sagittal plane of a scan with contours: prediction solid, reference dashed white.

    Planes are in radiological orientation with letters on the edges, pixels have their true proportions in mm, and a bar
    gives the scale. Oblique grids are shown along their own axes, lettered by the nearest patient axis. A single slice
    gives one plane.

    Parameters
    ----------
    image : Volume
        The scan; three channels on a single slice are shown in colour.
    prediction, reference : LabelMap
        On the grid of the image.
    focus : "area" or "disagreement"
        Each plane is the one with the largest area of structures, or where prediction and reference differ most.
    window : (low, high), optional
        Intensities that become black and white; by default -160 to 240 HU for CT, else percentiles 0.5 and 99.5.
    channel : int
        The channel that is shown.
    zoom : bool
        Show the surroundings of the structures only.
    fill : bool
        Tint the inside of the prediction.

    Returns
    -------
    bytes
        A PNG, about 500 pixels high per plane.

    Raises
    ------
    GeometryError
        If the grids differ.
    """
    prediction.geometry.require_close(image.geometry, "prediction and image")
    if reference is not None:
        reference.geometry.require_close(image.geometry, "reference and image")
    structures = union((*prediction.structures, *(reference.structures if reference else ())))
    is_picture = str(image.meta.get("path", "")).lower().endswith(PICTURES)
    image, prediction = reorient(image, "RAS"), reorient(prediction, "RAS")
    both = [prediction] if reference is None else [prediction, reorient(reference, "RAS")]
    geometry, pixels, wanted = image.geometry, _shades(image, channel, window), _wanted(both, focus)
    at = _position(wanted)
    box = _surroundings(_wanted(both, "area"), geometry) if zoom else tuple(slice(0, n) for n in geometry.shape)
    views = [v for v in _VIEWS if min(geometry.shape[v.across], geometry.shape[v.down]) > 1] or [_VIEWS[0]]
    figure, axes = _canvas([_length(box, v.across, geometry) / _length(box, v.down, geometry) for v in views])
    area: Counter[int] = Counter()
    for view, ax in zip(views, axes, strict=True):
        _draw_plane(ax, view, pixels, geometry, at[view.through], box)
        if not is_picture:
            _letters(ax, view)
        if not (is_picture and geometry.spacing == (1, 1, 1)):  # what readers take where a picture tells no size
            _scale_bar(ax, _length(box, view.across, geometry))
        for labels, style in zip(both, ("solid", "dashed"), strict=False):
            for s in labels.structures:
                mask = _plane_mask(labels, s.number, view, at[view.through])
                if mask.any():
                    _draw_outline(ax, _outline(mask, view, geometry), s, style == "dashed", fill)
                    area[s.number] += int(np.count_nonzero(mask))
    structures = union(s for labels in both for s in labels.structures)
    shown = sorted((s for s in structures if s.number in area), key=lambda s: -area[s.number])
    _legend(figure, shown, has_reference=len(both) > 1)
    return _png(figure)


def overview_picture(image: Volume, labels: LabelMap, **options: Any) -> bytes:
    """What comes out, in one picture: :func:`planes_picture` with tinted structures. Takes its options."""
    return planes_picture(image, labels, fill=True, **options)


def curve_picture(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and validation IoU over time.

    Parameters
    ----------
    history : sequence of mappings
        One per validation, with "loss" and "iou", and "minutes" or "epoch" or "step"; as ``history.json`` of a run.

    Returns
    -------
    bytes
        A PNG with a transparent background, readable on light and dark pages.

    Raises
    ------
    ValueError
        If the history is empty or lacks the loss.
    """
    if not history or not all("loss" in row for row in history):
        raise ValueError(f"history must have rows with a loss, got {list(history)[:1]}")
    unit = next((u for u in ("minutes", "epoch", "step") if all(u in row for row in history)), "validation")
    times = [float(row.get(unit, n)) for n, row in enumerate(history, start=1)]
    figure = Figure(figsize=(8.4, 2.9), dpi=DPI)
    ax = figure.add_subplot()
    lines = _line(ax, times, [float(row["loss"]) for row in history], "training loss", "#d1603d")
    ax.set(xlabel=unit, ylabel="training loss")
    if any("iou" in row for row in history):
        other = ax.twinx()
        lines += _line(
            other,
            times,
            [float(np.nan if row.get("iou") is None else row["iou"]) for row in history],
            "validation IoU",
            "#2f86d6",
        )
        other.set(ylabel="validation IoU", ylim=(0, 1))
        _quiet(other)
    _quiet(ax)
    ax.grid(color=GREY, alpha=0.25, linewidth=0.6)
    ax.legend(
        handles=lines,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.16),
        ncols=2,
        frameon=False,
        labelcolor=GREY,
        fontsize=9,
    )
    return _png(figure, transparent=True)


def _line(ax: Axes, times: Sequence[float], values: Sequence[float], name: str, color: str) -> list[Any]:
    marker = "o" if len(times) < 40 else ""
    return ax.plot(times, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=name)


def _quiet(ax: Axes) -> None:
    ax.tick_params(colors=GREY, labelsize=8, length=3)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=GREY, fontsize=9)
    for name, spine in ax.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(GREY)


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def _shades(image: Volume, channel: int, window: tuple[float, float] | None) -> Array:
    """Grey values (I, J, K) or colours (I, J, K, 3) in 0..1."""
    if image.channels == 3 and image.geometry.shape[2] == 1 and image.array.dtype == np.uint8:
        return np.moveaxis(image.array, 0, 3) / np.float32(255)
    if not 0 <= channel < image.channels:
        raise ValueError(f"channel must be below the number of channels {image.channels}, got {channel}")
    voxels = np.nan_to_num(np.asarray(image.array[channel], np.float32), posinf=0, neginf=0)
    if window is None:
        sample = voxels[tuple(slice(None, None, max(1, n // 96)) for n in voxels.shape)]
        is_ct = image.modality == "CT" or (np.issubdtype(image.array.dtype, np.integer) and sample.min() <= -900)
        low, high = np.percentile(sample, (0.5, 99.5))
        window = CT_WINDOW_HU if is_ct else (float(low), float(high))
    return np.clip((voxels - window[0]) / max(window[1] - window[0], 1e-9), 0, 1)


def _wanted(both: Sequence[LabelMap], focus: Focus) -> Array:
    """(I, J, K) bool: voxels of structures, or those where prediction and reference differ (if any do)."""
    if focus == "disagreement" and len(both) == 2:
        wanted = _joined(both, np.logical_xor)
        if wanted.any():
            return wanted
    return _joined(both, np.logical_or)


def _joined(both: Sequence[LabelMap], join: Any) -> Array:
    """Voxels where any structure is in one label map or (xor: not) in the other; one mask at a time."""
    if not any(labels.is_layered for labels in both):
        one, other = both[0].array, both[-1].array
        return np.asarray(one != other if join is np.logical_xor else (one > 0) | (other > 0))
    wanted = np.zeros(both[0].geometry.shape, bool)
    for s in union(s for labels in both for s in labels.structures):
        masks = [labels.mask(s.number) for labels in both if s.number in labels.names]
        wanted |= join(*masks) if len(masks) == 2 else masks[0]
    return wanted


def _position(wanted: Array) -> list[int]:
    """Index along each axis of the plane with most wanted voxels; the middle where there are none."""
    counts = [np.count_nonzero(wanted, axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return [int(c.argmax()) if c.any() else len(c) // 2 for c in counts]


def _surroundings(wanted: Array, geometry: Geometry, margin: float = 0.35) -> tuple[slice, ...]:
    """Box around the wanted voxels with a margin of this part of its longest edge (mm), inside the grid."""
    box = bounding_box(wanted) or tuple(slice(0, n) for n in geometry.shape)
    low, high = (np.array([getattr(s, edge) for s in box]) for edge in ("start", "stop"))
    reach = margin * ((high - low) * geometry.spacing).max() / np.asarray(geometry.spacing)
    start = np.maximum(0, np.floor(low - reach)).astype(int)
    stop = np.minimum(geometry.shape, np.ceil(high + reach)).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def _length(box: Sequence[slice], axis: int, geometry: Geometry) -> float:
    return float((box[axis].stop - box[axis].start) * geometry.spacing[axis])


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _canvas(widths: Sequence[float]) -> tuple[Figure, Iterator[Axes]]:
    """A dark figure with one panel per plane; widths are relative to the height."""
    shown = [min(max(w, 0.3), 3.0) for w in widths]
    figure = Figure(figsize=(PANEL_IN * sum(shown) + 0.06 * (len(shown) + 1), PANEL_IN + 0.42), dpi=DPI, facecolor=DARK)
    grid = figure.add_gridspec(
        1,
        len(shown),
        width_ratios=shown,
        left=0.008,
        right=0.992,
        top=0.985,
        bottom=0.42 / (PANEL_IN + 0.42),
        wspace=0.02,
    )
    return figure, iter([figure.add_subplot(grid[0, n]) for n in range(len(shown))])


def _plane(array: Array, view: _View, index: int) -> Array:
    """Plane (down, across[, 3]) of an array (I, J, K[, 3])."""
    plane = np.take(array, index, axis=view.through)
    return np.moveaxis(plane, 0, 1)  # axes come in the order across, down


def _draw_plane(ax: Axes, view: _View, pixels: Array, geometry: Geometry, index: int, box: Sequence[slice]) -> None:
    width, height = (geometry.spacing[a] for a in (view.across, view.down))
    plane = _plane(pixels, view, index)
    rows, columns = plane.shape[:2]
    extent = (-width / 2, (columns - 0.5) * width, -height / 2, (rows - 0.5) * height)
    ax.imshow(
        plane, cmap="gray", vmin=0, vmax=1, origin="lower", extent=extent, interpolation="bilinear", aspect="equal"
    )
    across, down = box[view.across], box[view.down]
    left, right = (across.start - 0.5) * width, (across.stop - 0.5) * width
    bottom, top = (down.start - 0.5) * height, (down.stop - 0.5) * height
    ax.set(xlim=(right, left), ylim=(bottom, top), facecolor="black")  # R, or A, grows to the left
    ax.set_axis_off()


def _letters(ax: Axes, view: _View) -> None:
    """Where the edges lie in the patient."""
    _write(ax, 0.02, 0.5, view.left, ha="left", va="center")
    _write(ax, 0.98, 0.5, view.right, ha="right", va="center")
    _write(ax, 0.5, 0.975, view.top, ha="center", va="top")
    _write(ax, 0.5, 0.025, view.bottom, ha="center", va="bottom")


def _write(ax: Axes, x: float, y: float, text: str, **options: Any) -> None:
    outline = [withStroke(linewidth=2, foreground="black")]
    ax.text(
        x, y, text, transform=ax.transAxes, color=PALE, fontsize=8.5, weight="bold", path_effects=outline, **options
    )


def _scale_bar(ax: Axes, width_mm: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten mm, at most a third of the width, in the lower left corner."""
    power = 10.0 ** np.floor(np.log10(width_mm / 3))
    length = power * max(f for f in (1, 2, 5) if f * power <= width_mm / 3)
    line = ax.plot([0.03, 0.03 + length / width_mm], [0.035, 0.035], transform=ax.transAxes, color=PALE, linewidth=2)[0]
    line.set_path_effects([withStroke(linewidth=4, foreground="black")])
    _write(ax, 0.03, 0.05, f"{length / 10:g} cm" if length >= 10 else f"{length:g} mm", ha="left", va="bottom")


def _plane_mask(labels: LabelMap, number: int, view: _View, index: int) -> Array:
    """(down, across) mask of one structure in a plane; only that plane is looked at."""
    if not labels.is_layered:
        return np.asarray(_plane(labels.array, view, index) == number)
    layer = labels.array[[s.number for s in labels.structures].index(number)]
    return np.asarray(_plane(layer, view, index) >= 0.5)


def _outline(mask: Array, view: _View, geometry: Geometry) -> Outline:
    """Contours of a mask (down, across) as one path (mm), holes included."""
    scale = (geometry.spacing[view.across], geometry.spacing[view.down])
    rings = [np.asarray(ring)[:, ::-1] * scale for ring in mask_to_polygons(mask, "smooth")]
    paths = [Outline(np.concatenate([r, r[:1]]), closed=True) for r in rings]
    return Outline.make_compound_path(*paths)


def _draw_outline(ax: Axes, outline: Outline, structure: Structure, is_reference: bool, fill: bool) -> None:
    color = tuple(c / 255 for c in structure.color)
    style: dict[str, Any] = {"edgecolor": color, "linewidth": 1.3, "zorder": 3}
    rim, opacity = 1.1, 0.55
    if is_reference:  # white dashes on tissue that is white, too, are seen by their rim
        style = {"edgecolor": "white", "linestyle": (0, (2.2, 1.8)), "linewidth": 0.9, "zorder": 4}
        rim, opacity = 1.4, 1.0
    elif fill:
        ax.add_patch(PathPatch(outline, facecolor=color, edgecolor="none", alpha=0.28))
    halo = [withStroke(linewidth=style["linewidth"] + rim, foreground="black", alpha=opacity)]
    ax.add_patch(PathPatch(outline, facecolor="none", joinstyle="round", path_effects=halo, **style))


def _legend(figure: Figure, structures: Sequence[Structure], has_reference: bool) -> None:
    """Names in the colours of the structures, as many as fit, and what solid and dashed mean, on the bottom line."""
    renderer, y, x, end = FigureCanvasAgg(figure).get_renderer(), 0.035, 0.01, 0.99

    def width(text: Text) -> float:
        return float(text.get_window_extent(renderer).width / figure.bbox.width)

    if has_reference:
        end -= (
            width(figure.text(end, y, "solid: prediction   dashed: reference", color=GREY, fontsize=8, ha="right"))
            + 0.02
        )
    count = figure.text(x, y, f"and {len(structures)} more", fontsize=8)  # of names that did not fit
    room = width(count) + 0.014
    count.remove()
    for n, s in enumerate(structures):
        name = s.name if len(s.name) <= 28 else s.name[:27] + "…"
        text = figure.text(x, y, f"■ {name}", color=[c / 255 for c in s.color], fontsize=8)
        x += width(text) + 0.014
        if x > end - (room if n + 1 < len(structures) else 0):
            text.set(text=f"and {len(structures) - n} more", color=GREY)
            return


def _png(figure: Figure, transparent: bool = False) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", transparent=transparent, **({"bbox_inches": "tight"} if transparent else {}))
    return out.getvalue()
