"""The header ``dataset.json`` of the Medical Segmentation Decathlon and of nnU-Net (versions 1 and 2)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "DeclaredLabels", "declared_channels", "declared_labels", "declared_unknown", "label_numbers", "path_inside",
    "read_header",
]  # fmt: skip


class DeclaredLabels(NamedTuple):
    """What a header says on labels: names by number (None where nothing), regions, and the label to be ignored."""

    labels: dict[int, str] | None = None
    regions: dict[str, tuple[int, ...]] = {}
    ignore: int | None = None


def read_header(root: Path) -> dict[str, Any]:
    """The contents of ``dataset.json`` in a folder, empty where there is none.

    A folder without it may hold ``cases.json`` that names its labels and, under "cases", the "rois" contoured in each
    (as OpenKBP's does): the others are unknown there.
    """
    path = root / "dataset.json"
    if path.is_file():
        return _object(path)
    path = root / "cases.json"
    header = _object(path) if path.is_file() else {}
    labels, cases = header.get("labels"), header.get("cases")
    if not isinstance(labels, dict) or not isinstance(cases, dict):
        return {}
    drawn = {case: e["rois"] for case, e in cases.items() if isinstance(e, dict) and isinstance(e.get("rois"), list)}
    if len(drawn) < len(cases):
        return {}
    unknown = {case: [n for n, name in labels.items() if name not in rois] for case, rois in drawn.items()}
    return {"labels": labels, "unknown": unknown, "contoured": True}


def _object(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} must be JSON, got {error} in {path}; correct it") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} must be an object, got {type(header).__name__} in {path}; correct it")
    return header


def declared_channels(header: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    """Names of the image channels in their order, None where nothing is declared."""
    names = header.get("channel_names", header.get("modality"))
    if names is None:
        return None
    if not isinstance(names, dict) or not names or {str(n) for n in range(len(names))} != set(names):
        raise ValueError(f'channels must be numbered from "0" like {{"0": "CT"}}, got {names!r} in {path}; correct it')
    return tuple(str(names[str(n)]) for n in range(len(names)))


def declared_labels(header: Mapping[str, Any], path: Path) -> DeclaredLabels:
    """Labels of the Decathlon ({"1": "liver"}) or nnU-Net version 2 ({"liver": 1}, regions {"whole tumour": [1, 2]}).

    Where there are regions, every entry is one, in the order of the file; labels without an entry of their own are
    called "label 2". "ignore" marks voxels that do not count.
    """
    entries = header.get("labels")
    if entries is None:
        return DeclaredLabels()
    if not isinstance(entries, dict):
        raise ValueError(f'labels must be an object like {{"background": 0, "liver": 1}}, got {entries!r} in {path}')
    names: dict[int, str] = {}
    regions: dict[str, tuple[int, ...]] = {}
    for key, value in entries.items():
        number, name = (key, value) if isinstance(value, str) and str(key).isdigit() else (value, str(key))
        numbers = [_whole(n, key, value, path) for n in (number if isinstance(number, list) else [number])]
        is_region = len(numbers) != 1
        if is_region and (not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers) or name == "ignore"):
            raise ValueError(f"region must unite distinct labels of at least 1, got {key!r}: {value!r} in {path}")
        regions[name] = tuple(numbers)
        if not is_region:
            if numbers[0] in names:
                raise ValueError(f"labels must have distinct numbers, got {numbers[0]} twice in {path}; correct it")
            names[numbers[0]] = name
    ignore = next((n for n, name in names.items() if name == "ignore"), None)
    has_regions = any(len(numbers) > 1 for numbers in regions.values())
    regions = {name: numbers for name, numbers in regions.items() if numbers not in ((0,), (ignore,))}
    if any(ignore in numbers for numbers in regions.values()):
        raise ValueError(f"regions must not hold the label to be ignored, got {ignore} in one of {path}; correct it")
    order = header.get("regions_class_order")
    if has_regions and order is not None and (not isinstance(order, list) or len(order) != len(regions)):
        raise ValueError(f"regions_class_order must name one number per region, got {order!r} in {path}; correct it")
    values = sorted({n for numbers in regions.values() for n in numbers})
    labels = {n: names.get(n, f"label {n}") for n in (values if has_regions else names) if n not in (0, ignore)}
    return DeclaredLabels(labels, regions if has_regions else {}, ignore)


def _whole(number: Any, key: Any, value: Any, path: Path) -> int:
    is_number = isinstance(number, int) or (isinstance(number, str) and number.isdigit())
    if not is_number or isinstance(number, bool):
        raise ValueError(
            f"labels must be whole numbers with a name, or lists of them, got {key!r}: {value!r} in {path}; correct it"
        )
    return int(number)


def declared_unknown(
    header: Mapping[str, Any], names: Mapping[int, str] | None, path: Path
) -> dict[str, tuple[int, ...]]:
    """Labels that were not drawn by case, of the key "unknown": {"case": [numbers or names]}."""
    entries = header.get("unknown", {})
    if not isinstance(entries, dict) or any(not isinstance(v, list) for v in entries.values()):
        raise ValueError(f'unknown must be like {{"case": [1, "liver"]}}, got {entries!r} in {path}; correct it')
    return {case: label_numbers(labels, names, f"case {case} of {path}") for case, labels in entries.items()}


def label_numbers(labels: Sequence[Any], names: Mapping[int, str] | None, where: str) -> tuple[int, ...]:
    """Numbers of labels that are given by number or name, sorted; declared where anything is declared."""
    by_name = {name.strip().lower(): n for n, name in (names or {}).items()}
    numbers = set()
    for label in labels:
        text = str(label).strip()
        number = int(text) if text.isdigit() else by_name.get(text.lower())
        if number is None or number == 0 or (names is not None and number not in names):
            declared = ", ".join(f"{n} {name}" for n, name in names.items()) if names else "none"
            raise ValueError(
                f"unknown labels must be declared (dataset.json declares {declared}), got {label!r} for {where}; "
                "correct it, or use the label's number"
            )
        numbers.add(number)
    return tuple(sorted(numbers))


def path_inside(root: Path, name: Any) -> Path:
    """The path of a name in dataset.json, which must stay inside the folder."""
    normal = os.path.normpath(str(name))
    if not isinstance(name, str) or os.path.isabs(normal) or normal.split(os.sep)[0] in (os.pardir, os.curdir):
        raise ValueError(
            f"files listed in dataset.json must lie inside its folder, got {name!r} in {root / 'dataset.json'}; "
            "use relative paths without '..', or a CSV"
        )
    return root / normal
