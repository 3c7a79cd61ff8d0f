"""What the label files of all formats share: integer values, and structures as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Code, LabelMap, Structure

__all__ = ["exclusive_array", "integer_labels", "structures_from_json", "structures_to_json"]

_BLOCK = 1 << 22  # voxels looked at together, so that a check needs no second array of the size of the first


def integer_labels(array: NDArray[Any], where: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Voxels as integer labels, and a sentence where they were stored as floating point numbers.

    Floats become the smallest of uint8, int16 and int32 that holds them; O(voxels) time, one block extra memory.

    Raises
    ------
    ValueError
        If a value is not an integer; ``where`` names the file in the message.
    """
    if array.dtype == bool:
        return array.view(np.uint8), ()
    if np.issubdtype(array.dtype, np.integer):
        return array, ()
    flat = array.ravel(order="K")
    low, high = np.inf, -np.inf
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        wrong = block[np.rint(block) != block]  # NaN differs from everything
        if wrong.size or not np.isfinite(block).all():
            value = wrong[0] if wrong.size else block[~np.isfinite(block)][0]
            raise ValueError(
                f"labels must be integers, got {value:g} in {where}; read probabilities as an image (medseg.read)"
            )
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    fitting = [t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max]
    if not fitting:
        raise ValueError(f"labels must fit in 32 bits, got {low:g} to {high:g} in {where}")
    return array.astype(fitting[0]), (f"labels are stored as {array.dtype}; every value is an integer",)


def exclusive_array(labels: LabelMap, where: str) -> NDArray[Any]:
    """The (I, J, K) integers of a label map for a format that holds nothing else.

    Raises
    ------
    ValueError
        If structures overlap or are probabilities.
    """
    if labels.is_layered and labels.array.dtype != bool:
        raise ValueError(f"labels must not be probabilities in {where}; write them as NIfTI, or cut them first")
    return np.asarray(labels.exclusive().array)


def structures_to_json(structures: Iterable[Structure]) -> dict[str, Any]:
    """Number -> name, colour and codes, as JSON types."""
    found: dict[str, Any] = {}
    for s in structures:
        entry: dict[str, Any] = {"name": s.name, "color": list(s.color)}
        entry |= {key: list(code) for key in ("category", "type", "region") if (code := getattr(s, key))}
        found[str(s.number)] = entry
    return found


def structures_from_json(value: Any) -> tuple[Structure, ...]:
    """The inverse of :func:`structures_to_json`.

    Raises
    ------
    ValueError
        If the value does not have that form.
    """
    found = []
    try:
        for number, entry in value.items():
            category, kind, region = (Code(*entry[k]) if k in entry else None for k in ("category", "type", "region"))
            red, green, blue = (int(c) for c in entry["color"])
            found.append(Structure(int(number), str(entry["name"]), (red, green, blue), category, kind, region))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"structures must map numbers to name and color, got {value!r}") from error
    return tuple(found)
