"""Data sets listed in a CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from medseg.cases import Case, Dataset, some
from medseg.dataset_json import declared_channels, declared_labels, declared_unknown, label_numbers, read_header

__all__ = ["dataset_of_csv"]

COLUMNS = "case,image[,image_2...][,label][,group][,unknown]"


def dataset_of_csv(path: Path) -> Dataset:
    """The cases of a CSV in its own order; a ``dataset.json`` beside it names channels and labels."""
    rows, columns = _rows(path)
    header, header_path = read_header(path.parent), path.parent / "dataset.json"
    declared = declared_labels(header, header_path)
    unknown = declared_unknown(header, declared.labels, header_path)
    cases, missing = [], []
    for number, row in enumerate(rows, start=2):
        images = tuple(path.parent / row[c] if row[c] else None for c in columns)
        label = path.parent / row["label"] if row.get("label") else None
        missing += [str(p) for p in (*images, label) if p is not None and not p.exists()]
        not_drawn = [name for name in row.get("unknown", "").split(";") if name.strip()]
        numbers = label_numbers(not_drawn, declared.labels, f"row {number} of {path}") if not_drawn else ()
        every = tuple(sorted({*numbers, *unknown.get(row["case"], ())}))
        cases.append(Case(row["case"], images, label, row.get("group") or row["case"], every))
    if missing:
        raise FileNotFoundError(
            f"files listed in {path} must exist, got none for {some(missing)}; paths are relative to the CSV"
        )
    names = declared_channels(header, header_path)
    return Dataset(
        name=path.stem,
        root=path.parent,
        cases=tuple(cases),
        channels=names if names is not None and len(names) == len(columns) else tuple(columns),
        labels=declared.labels,
        regions=declared.regions,
        ignore=declared.ignore,
    )


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows, checked, and the image columns in their order."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data set must be a folder or a CSV in UTF-8, got {path}; save it as UTF-8") from error
    first = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=";" if "," not in first and ";" in first else ",")
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    columns = _image_columns(reader.fieldnames, path)
    rows = []
    for number, raw in enumerate(reader, start=2):
        row = {k: (v or "").strip() for k, v in raw.items() if k and not isinstance(v, list)}
        if None in raw or not row["case"] or not any(row[c] for c in columns):
            raise ValueError(
                f"each row must fill case and {' or '.join(columns)}, and no more columns than the header has, "
                f"got row {number} of {path}; correct it"
            )
        rows.append(row)
    empty = [c for c in columns if rows and not any(row[c] for row in rows)]
    if empty:
        raise ValueError(f"each image column must be filled in some row, got none for {empty[0]} in {path}; remove it")
    return rows, columns


def _image_columns(header: Sequence[str], path: Path) -> list[str]:
    columns = sorted((c for c in header if re.fullmatch(r"image(_\d+)?", c)), key=lambda c: int(c[6:] or 1))
    unknown = sorted(set(header) - {"case", "label", "group", "unknown", *columns})
    if "case" not in header or "image" not in columns or unknown or len(set(header)) < len(header):
        raise ValueError(
            f"columns must be {COLUMNS}, got {','.join(header) or 'none'} in {path}; rename or remove the others"
        )
    return columns
