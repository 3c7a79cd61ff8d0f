"""Images of probabilities as label maps; channel 0 is the background, except where structures overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from medseg.volume import LabelMap, Structure, Volume

__all__ = ["labels_of", "layers_of", "overlap", "with_structures"]


def overlap(probabilities: Volume) -> bool:
    """Whether the structures may overlap: the file states as many as there are channels, none of them the background."""
    return len(probabilities.meta.get("structures", ())) == probabilities.channels


def labels_of(probabilities: Volume) -> LabelMap:
    """The structure of the largest probability (I, J, K), with the numbers and names that the file states.

    Parameters
    ----------
    probabilities : Volume (C, I, J, K)
        Channel 0 is the background, channel c the structure c - 1 of ``meta["structures"]`` (number c where there are
        none); one channel alone is that of a structure, taken from one half. Where structures overlap, each is, and
        the result has layers.
    """
    array = np.asarray(probabilities.array)
    if overlap(probabilities):
        return LabelMap(array >= 0.5, probabilities.geometry, _structures(probabilities))
    classes = (array[0] >= 0.5).astype(np.intp) if len(array) == 1 else array.argmax(0)
    structures = _structures(probabilities)
    numbers = np.array([0, *(s.number for s in structures)])
    labels = numbers.astype(np.min_scalar_type(int(numbers.max())))[classes]
    return LabelMap(labels, probabilities.geometry, structures)


def layers_of(probabilities: Volume) -> LabelMap:
    """The same probabilities as one layer per structure, without the background."""
    array = np.asarray(probabilities.array)
    all_layers = len(array) == 1 or overlap(probabilities)
    return LabelMap(array if all_layers else array[1:], probabilities.geometry, _structures(probabilities))


def with_structures(probabilities: Volume, names: Sequence[Mapping[int, str]]) -> Volume:
    """The probabilities with the structures that the file states; where it states none, with the first names that fit.

    Parameters
    ----------
    probabilities : Volume (C, I, J, K)
        Channel 0 is the background, unless there is one channel alone.
    names : sequence of mapping of number to name
        They fit where there are as many as channels of structures, which go in the order of the numbers.
    """
    count = max(1, probabilities.channels - 1)
    fitting = next((own for own in names if len(own) == count), None)
    if probabilities.meta.get("structures") or fitting is None:
        return probabilities
    structures = tuple(Structure(n, fitting[n]) for n in sorted(fitting))
    return replace(probabilities, meta={**probabilities.meta, "structures": structures})


def _structures(probabilities: Volume) -> tuple[Structure, ...]:
    made_up = tuple(Structure(c, f"label {c}") for c in range(1, max(2, probabilities.channels)))
    return tuple(probabilities.meta.get("structures") or made_up)
