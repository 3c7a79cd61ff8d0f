"""What a structure's name means: SNOMED CT codes and a colour for common structures, by a table in ``codes.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from medseg.volume import Code, Structure, default_color

__all__ = ["UNKNOWN", "Meaning", "described", "meaning_of"]

_CATEGORIES = {
    "anatomy": Code("91723000", "SCT", "Anatomical Structure"),
    "tissue": Code("85756007", "SCT", "Tissue"),
    "substance": Code("91720002", "SCT", "Body Substance"),
    "abnormal": Code("49755003", "SCT", "Morphologically Abnormal Structure"),
    "region": Code("309825002", "SCT", "Spatial and Relational Concept"),
}
UNKNOWN = Code("111030", "DCM", "Image Region")  # honest: a region of the image, nothing more is known
_SIDES = {
    "left": Code("7771000", "SCT", "Left"),
    "right": Code("24028007", "SCT", "Right"),
}
_SIDE_WORDS = {"l": "left", "lt": "left", "left": "left", "r": "right", "rt": "right", "right": "right"}


@dataclass(frozen=True)
class Meaning:
    """Category, type and, where the name tells, region and side of a structure."""

    category: Code
    type: Code
    region: Code | None = None
    side: Code | None = None
    color: tuple[int, int, int] | None = None


@cache
def _table() -> dict[str, Meaning]:
    found = {}
    for name, row in json.loads(files("medseg.io").joinpath("codes.json").read_text("utf-8")).items():
        value, text = row["code"]
        red, green, blue = row["color"]
        meaning = Meaning(_CATEGORIES[row["kind"]], Code(value, "SCT", text), color=(red, green, blue))
        for known in (name, *row.get("aliases", ())):
            found[_key(known.split())] = meaning
    return found


def _key(words: list[str]) -> str:
    return " ".join(sorted(words))  # "kidney left", "left kidney": the order of words does not matter


def meaning_of(name: str) -> Meaning:
    """Codes for a name such as "liver", "kidney_left", "Lt Lung", "vertebrae_L4" or "liver tumour".

    A name that the table does not know gives "Image Region", never a guess. An abnormality named with an anatomical
    structure has that structure as its region. A word for the side is taken off where the whole name is not known.

    Examples
    --------
    >>> meaning = meaning_of("Kidney_L")
    >>> meaning.type.meaning, meaning.side.meaning
    ('Kidney', 'Left')
    """
    words = re.findall(r"[a-z]+\d*|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    table = _table()
    if _key(words) in table:
        return table[_key(words)]
    sides = [w for w in words if w in _SIDE_WORDS]
    side = _SIDES[_SIDE_WORDS[sides[0]]] if len({_SIDE_WORDS[w] for w in sides}) == 1 else None
    rest = [w for w in words if w not in _SIDE_WORDS] if side else words
    if _key(rest) in table:
        return replace(table[_key(rest)], side=side)
    for n in range(1, len(rest)):  # "liver tumor", "tumor of liver"
        for head, tail in ((rest[:n], rest[n:]), (rest[n:], rest[:n])):
            place, what = table.get(_key([w for w in head if w not in ("of", "in")])), table.get(_key(tail))
            if place and what and what.category == _CATEGORIES["abnormal"] and place.category != what.category:
                return replace(what, region=place.type, side=side)
    return Meaning(_CATEGORIES["region"], UNKNOWN)


def described(structure: Structure) -> tuple[Structure, Code | None]:
    """The structure with category and type filled in from its name where it has none, and its side.

    Its colour becomes the customary one where it was only the default of its number.
    """
    meaning = meaning_of(structure.name)
    color = structure.color
    if meaning.color and color == default_color(structure.number):
        color = meaning.color
    if structure.type is not None:
        return replace(structure, category=structure.category or _CATEGORIES["anatomy"], color=color), None
    return replace(
        structure,
        category=structure.category or meaning.category,
        type=meaning.type,
        region=structure.region or meaning.region,
        color=color,
    ), meaning.side
