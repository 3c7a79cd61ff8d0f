"""The command that refines probabilities with the dense CRF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

import medseg
from medseg.cli.show import Device

__all__ = ["refine"]


def refine(
    image: Positional[Path],
    probabilities: Positional[Path],
    *,
    out: Path,
    preset: Literal["gentle", "pydensecrf"] = "gentle",
    device: Device = "auto",
    force: bool = False,
) -> None:
    """Refine probabilities with a dense CRF slice by slice and write the label map.

    Args:
        image: the image
        probabilities: its probabilities, channel 0 the background, as written by predict --probabilities
        out: label map to write
        preset: gentle (default), or the classic setting of pydensecrf, which often erases organs
        device: where to compute
        force: overwrite out
    """
    parameters = medseg.CRFParameters() if preset == "gentle" else medseg.CRFParameters.pydensecrf
    soft, maps = medseg.read(probabilities), medseg.probability_maps
    if maps.overlap(soft):  # each structure against everything else
        layers = medseg.refine(medseg.read(image), maps.layers_of(soft), parameters=parameters, device=device)
        labels = replace(layers, array=layers.array >= 0.5)
    else:
        labels = maps.labels_of(medseg.refine(medseg.read(image), soft, parameters=parameters, device=device))
    medseg.write(labels, out, force=force)
    print(out)
