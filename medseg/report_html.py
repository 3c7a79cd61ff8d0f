"""A report as one HTML file: the blocks it is made of, and how they become a page.

Everything that comes from data is escaped, pictures are inside the file, and a content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from medseg.io.files import atomic_path

__all__ = ["Block", "Cell", "Facts", "Interval", "Named", "Picture", "Section", "Table", "Text", "write_report"]

OPEN_ROWS = 12  # longer tables are folded up
UNDEFINED = '<span class="none" title="undefined"><i aria-hidden="true">–</i><span class="read">undefined</span></span>'


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, as a cell of a table; drawn as a bar where it is a share of 1."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    is_share: bool = False


@dataclass(frozen=True)
class Named:
    """A name with the colour of its structure, as a cell of a table."""

    name: str
    color: tuple[int, int, int]


Cell = str | int | float | None | Interval | Named


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values, side by side."""

    values: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption; ``alt`` says in words what is on it."""

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; a column of numbers is set flush right. Long ones are folded up unless ``is_open``."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    is_open: bool = False


Block = Text | Facts | Picture | Table


@dataclass(frozen=True)
class Section:
    """A part of a report with a heading of its own."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def write_report(
    path: str | os.PathLike[str],
    sections: Iterable[Section],
    *,
    title: str,
    subtitle: str = "",
    force: bool = False,
) -> None:
    """Write a report as a single HTML file.

    Parameters
    ----------
    path : path
        The file.
    sections : iterable of Section
        In the order of the page.
    title, subtitle : str
        Heading of the page and the line below it.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    """
    sections = list(sections)
    anchors = [
        f"{re.sub(r'[^a-z0-9]+', '-', s.title.lower()).strip('-') or 'section'}-{n}" for n, s in enumerate(sections)
    ]
    links = "".join(f'<a href="#{a}">{_text(s.title)}</a>' for a, s in zip(anchors, sections, strict=True))
    body = "\n".join(_section(s, a) for a, s in zip(anchors, sections, strict=True))
    page = (
        resources.files("medseg")
        .joinpath("report.html")
        .read_text(encoding="utf-8")
        .replace("{{title}}", _text(title))
        .replace("{{subtitle}}", f"<p>{_text(subtitle)}</p>" if subtitle else "")
        .replace("{{links}}", links if len(sections) > 1 else "")
        .replace("{{body}}", body)
    )
    with atomic_path(path, force) as temporary:
        temporary.write_text(page, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(section: Section, anchor: str) -> str:
    blocks = "\n".join(_block(b) for b in section.blocks)
    heading = f'<h2 id="{anchor}-h">{_text(section.title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-h">\n{heading}\n{blocks}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Facts):
        pairs = "".join(f"<div><dt>{_text(k)}</dt><dd>{_shown(v)}</dd></div>" for k, v in block.values.items())
        return f'<dl class="facts">{pairs}</dl>'
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{_text(block.alt)}">'
        return f"<figure>{image}<figcaption>{_text(block.caption)}</figcaption></figure>"
    return _table(block)


def _table(table: Table) -> str:
    is_numeric = [
        any(isinstance(row[n], int | float | Interval) for row in table.rows)
        and all(row[n] is None or isinstance(row[n], int | float | Interval) for row in table.rows)
        for n in range(len(table.columns))
    ]
    kinds = [' class="number"' if numeric else "" for numeric in is_numeric]
    head = "".join(f'<th scope="col"{k}>{_text(c)}</th>' for c, k in zip(table.columns, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{_cell(c)}</th>' if n == 0 else f"<td{k}>{_cell(c)}</td>"
            for n, (c, k) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>\n"
        for row in table.rows
    )
    caption = _text(table.caption)
    grid = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )
    if table.is_open or len(table.rows) <= OPEN_ROWS:
        return grid
    return f"<details><summary>{caption} ({len(table.rows)} rows)</summary>{grid}</details>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Named):
        color = "#{:02x}{:02x}{:02x}".format(*cell.color)
        return f'<span class="swatch" style="background:{color}" aria-hidden="true"></span>{_text(cell.name)}'
    if isinstance(cell, Interval):
        if cell.mean is None:
            return _shown(None)
        has_ends = cell.low is not None and cell.high is not None
        ends = f' <span class="interval">{_shown(cell.low)} – {_shown(cell.high)}</span>' if has_ends else ""
        return f"{_shown(cell.mean)}{ends}{_bar(cell) if cell.is_share else ''}"
    return _shown(cell)


def _shown(value: str | int | float | None) -> str:
    """A number with three digits that count; an undefined one as a dash that is read out as "undefined"."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNDEFINED
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else _text(value)


def _bar(interval: Interval) -> str:
    """A line from 0 to 1 with the interval and the mean on it; what it says is in the text beside it."""
    mean = 100 * min(max(interval.mean or 0, 0), 1)
    low, high = (
        100 * min(max(v if v is not None else interval.mean or 0, 0), 1) for v in (interval.low, interval.high)
    )
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rail" y="3" width="100" height="2"/><rect class="fill" y="3" width="{mean:.1f}" height="2"/>'
        f'<rect class="range" x="{low:.1f}" y="1.5" width="{max(high - low, 0.6):.1f}" height="5"/></svg>'
    )
