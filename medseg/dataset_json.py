"""The header ``dataset.json`` of the Medical Segmentation Decathlon and of nnU-Net (versions 1 and 2)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["declared_channels", "declared_labels", "path_inside", "read_header"]


def read_header(path: Path) -> dict[str, Any]:
    """The contents of a dataset.json, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"dataset.json must be JSON, got {error} in {path}; correct it") from error
    if not isinstance(header, dict):
        raise ValueError(f"dataset.json must be an object, got {type(header).__name__} in {path}; correct it")
    return header


def declared_channels(header: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    """Names of the image channels in their order, None where nothing is declared."""
    names = header.get("channel_names", header.get("modality"))
    if names is None:
        return None
    if not isinstance(names, dict) or not names or {str(n) for n in range(len(names))} != set(names):
        raise ValueError(f'channels must be numbered from "0" like {{"0": "CT"}}, got {names!r} in {path}; correct it')
    return tuple(str(names[str(n)]) for n in range(len(names)))


def declared_labels(labels: Any, path: Path) -> dict[int, str] | None:
    """Names by number, of the Decathlon ({"1": "liver"}) or nnU-Net version 2 ({"liver": 1})."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise ValueError(f'labels must be an object like {{"background": 0, "liver": 1}}, got {labels!r} in {path}')
    names: dict[int, str] = {}
    for key, value in labels.items():
        number, name = (key, value) if isinstance(value, str) and str(key).isdigit() else (value, key)
        is_number = isinstance(number, int) or (isinstance(number, str) and number.isdigit())
        if not is_number or isinstance(number, bool) or name == "ignore":
            raise ValueError(
                f"labels must be whole numbers with a name, got {key!r}: {value!r} in {path}; nnU-Net's regions and "
                "ignore label are not supported: declare one number per structure"
            )
        if int(number) in names:
            raise ValueError(f"labels must have distinct numbers, got {number} twice in {path}; correct it")
        names[int(number)] = str(name)
    names.pop(0, None)
    return names


def path_inside(root: Path, name: Any) -> Path:
    """The path of a name in dataset.json, which must stay inside the folder."""
    normal = os.path.normpath(str(name))
    if not isinstance(name, str) or os.path.isabs(normal) or normal.split(os.sep)[0] in (os.pardir, os.curdir):
        raise ValueError(
            f"files listed in dataset.json must lie inside its folder, got {name!r} in {root / 'dataset.json'}; "
            "use relative paths without '..', or a CSV"
        )
    return root / normal
