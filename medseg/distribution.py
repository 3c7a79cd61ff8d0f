"""Plots of how a metric is spread over cases: a box and all points per structure. PNG bytes, no display needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["MOST_DRAWN", "distribution_picture"]

GREY, BLUE, DPI = "#7d8794", (47, 134, 214), 150  # grey is readable on white and on black
ROW_IN, WIDTH_IN = 0.34, 8.4
SHARES = ("iou", "dice", "nsd", "precision", "recall")
MOST_DRAWN = 40  # structures drawn; more do not fit a page


def distribution_picture(
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, str],
    colors: Mapping[str, tuple[int, int, int]] | None = None,
) -> bytes:
    """Boxes (quartiles, whiskers of 1.5 interquartile ranges) with a point per case, one line per structure.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of an evaluation.
    metrics : mapping of column to its name on the axis
        One panel each, side by side.
    colors : mapping of structure to (R, G, B), optional

    Returns
    -------
    bytes
        A PNG with a transparent background, readable on light and dark pages. The first 40 structures are drawn. Distances
        that stand for a missing structure lie on the right edge as triangles.
    """
    scored = [row for row in rows if not row.get("error")]
    names = list(dict.fromkeys(row["structure"] for row in scored))[:MOST_DRAWN]
    figure = Figure(figsize=(WIDTH_IN, ROW_IN * max(1, len(names)) + 0.75), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for ax, (metric, title) in zip(axes, metrics.items(), strict=True):
        end = _end_of_axis(scored, metric)
        for place, name in enumerate(names):
            values = np.array([row.get(metric, np.nan) for row in scored if row["structure"] == name], float)
            values = values[np.isfinite(values)]
            color = tuple(c / 255 for c in (colors or {}).get(name, BLUE))
            if len(values) > 2:
                ax.boxplot(
                    [values], positions=[place], widths=0.62, orientation="horizontal", showfliers=False,
                    manage_ticks=False, medianprops={"color": color, "linewidth": 2},
                    **{k: {"color": GREY} for k in ("boxprops", "whiskerprops", "capprops")},
                )  # fmt: skip
            y = place + 0.4 * (np.arange(len(values)) * 0.618 % 1 - 0.5)  # spread evenly, the same at every run
            inside = values <= end
            ax.scatter(values[inside], y[inside], s=11, color=color, alpha=0.6, linewidths=0, zorder=3)
            beyond = np.full((~inside).sum(), end)
            ax.scatter(beyond, y[~inside], s=16, color=color, marker=">", zorder=3, clip_on=False)
        if np.isfinite(end):
            ax.set_xlim(-0.04 * end, end)
        if metric in SHARES:
            ax.set_xlim(-0.03, 1.03)
        ax.set(ylim=(len(names) - 0.4, -0.6))
        ax.set_yticks(range(len(names)), [n if len(n) <= 26 else f"{n[:25]}…" for n in names])
        ax.set_xlabel(title, color=GREY, fontsize=9)
        ax.tick_params(colors=GREY, labelsize=8, length=3)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        for side, spine in ax.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GREY)
    figure.tight_layout(pad=0.4, w_pad=1.6)
    out = io.BytesIO()
    figure.savefig(out, format="png", transparent=True)
    return out.getvalue()


def _end_of_axis(rows: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Where an axis of distances ends: a little beyond the largest in cases where both sides have the structure, so that
    the diagonal of the image, which stands for a missing one, does not squeeze the others. Infinite for other metrics.
    """
    if not metric.endswith("_mm"):
        return float("inf")
    both = [row for row in rows if row.get("volume_mm3", 1) > 0 and row.get("reference_volume_mm3", 1) > 0]
    values = np.array([row.get(metric, np.nan) for row in both], float)
    values = values[np.isfinite(values)]
    return 1.08 * float(values.max()) if values.size and values.max() > 0 else float("inf")
