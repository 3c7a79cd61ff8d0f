"""Commands about masks: refine, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

import medseg
from medseg.cli.show import Device, bar, show_evaluation

__all__ = ["evaluate", "refine"]


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
    refined = medseg.refine(medseg.read(image), medseg.read(probabilities), parameters=parameters, device=device)
    medseg.write(medseg.batch.labels_of(refined), out, force=force)
    print(out)


def evaluate(
    prediction: Positional[Path],
    reference: Positional[Path],
    *,
    out: Path | None = None,
    image: Path | None = None,
    compare: Path | None = None,
    lesions: bool = False,
    tolerance_mm: float = 1.0,
    labels_present: bool = False,
    resample: bool = False,
    common_only: bool = False,
    json: bool = False,
    force: bool = False,
) -> int:
    """Compare predictions with references: rows per case and structure, summary with confidence intervals.

    Exit code 1 when a case could not be scored.

    Args:
        prediction: a label map or a folder of them
        reference: a label map or a folder of them (matched by file name)
        out: folder for metrics.json, metrics.csv and report.html
        image: scan or folder of scans of the same names, shown in the report
        compare: another prediction or folder of them, compared case by case with the first
        lesions: count the connected components that were found, missed and made up
        tolerance_mm: tolerance of the normalised surface Dice, in mm
        labels_present: score only structures that the reference of the case holds
        resample: put predictions on another grid onto that of the reference
        common_only: leave out cases that one side lacks
        json: print JSON
        force: overwrite outputs
    """
    with bar("evaluating") as progress:

        def scored(side: Path) -> Any:
            return medseg.evaluate(
                side, reference, tolerance_mm=tolerance_mm, lesions=lesions, labels_present=labels_present,
                resample=resample, common_only=common_only, progress=progress,
            )  # fmt: skip

        found, other = scored(prediction), scored(compare) if compare else None
    if out is not None:
        found.write(out, force=force)
        medseg.report_evaluation.report_of_evaluation(
            out / "report.html", found, prediction, reference, image=image, other=other, resample=resample, force=force
        )
    show_evaluation(found, json, [] if other is None else medseg.statistics.compare(other, found))
    return 1 if found.failed else 0
