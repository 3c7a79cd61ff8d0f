"""The command that refines probabilities with the dense CRF, or finds out whether that helps."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from json import loads
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

import medseg
from medseg.cli.show import Device, bar, print_json, print_table, say, show_warning

__all__ = ["refine"]


def refine(
    image: Positional[Path | None] = None,
    probabilities: Positional[Path | None] = None,
    *,
    out: Path | None = None,
    preset: Literal["gentle", "pydensecrf"] = "gentle",
    parameters: Path | None = None,
    gaussian_sigma_mm: float | None = None,
    gaussian_weight: float | None = None,
    bilateral_sigma_mm: float | None = None,
    bilateral_sigma_share: float | None = None,
    bilateral_sigma_intensity: float | None = None,
    bilateral_weight: float | None = None,
    iterations: int | None = None,
    clip: float | None = None,
    largest_loss: float | None = None,
    axis: Literal[0, 1, 2] = 2,
    fit: Path | None = None,
    fit_probabilities: Path | None = None,
    cases: int = 24,
    minutes: float | None = None,
    device: Device = "auto",
    json: bool = False,
    force: bool = False,
) -> int:
    """Refine probabilities with a dense CRF slice by slice and write the label map; or, with --fit, find its settings.

    medseg refine IMAGE PROBABILITIES --out FILE refines one image. medseg refine --fit RUN compares settings, and none, on
    the validation cases of a run and stores the choice in it for predict --crf. medseg refine --fit DATASET --out FILE
    does so on images, labels and probabilities of a data set; --parameters FILE, or FILE as crf.json in a run, uses it.

    Args:
        image: the image, a file or DICOM series
        probabilities: its probabilities, channel 0 the background, as written by predict --probabilities
        out: label map to write, .seg.dcm and .rtstruct.dcm included; with --fit DATASET the JSON file
        preset: gentle, or the classic setting of pydensecrf (in pixels), which often erases organs
        parameters: JSON file of --fit to use instead
        gaussian_sigma_mm: reach of the smoothing kernel, in mm; 1 (pydensecrf: 3 pixels)
        gaussian_weight: its weight; 1 (3)
        bilateral_sigma_mm: reach of the kernel that follows edges, in mm; 6 (80 pixels)
        bilateral_sigma_share: its tolerance in intensity, as a share of the image's range; 0.051 (0.051)
        bilateral_sigma_intensity: the same in units of the image, like HU
        bilateral_weight: its weight; 1 (10)
        iterations: steps of the mean field; 5 (5)
        clip: probabilities are clipped to clip and 1 - clip first; 0.001 (0.00001)
        largest_loss: a structure that would lose a larger share of its volume is kept as it was; 0.3 (1)
        axis: slices are perpendicular to this index axis
        fit: run, or data set with a folder probabilities of <case>_probabilities.nii.gz
        fit_probabilities: the folder of probabilities of a data set, of a model that was not trained on it
        cases: cases of --fit
        minutes: time for --fit; fewer cases where it is short
        device: where to compute
        json: print JSON
        force: overwrite out
    """
    single = {
        "gaussian_sigma_mm": gaussian_sigma_mm, "gaussian_weight": gaussian_weight,
        "bilateral_sigma_mm": bilateral_sigma_mm, "bilateral_sigma_share": bilateral_sigma_share,
        "bilateral_sigma_intensity": bilateral_sigma_intensity, "bilateral_weight": bilateral_weight,
        "iterations": iterations, "clip": clip, "largest_loss": largest_loss,
    }  # fmt: skip
    given = {name: value for name, value in single.items() if value is not None}
    if fit is not None:
        if image is not None or parameters is not None or given or preset != "gentle" or axis != 2:
            return _usage("--fit takes no image and no settings")
        return _fit(fit, fit_probabilities, out, cases, minutes, device, json, force)
    if image is None or probabilities is None or out is None:
        return _usage("IMAGE, PROBABILITIES and --out are needed, or --fit")
    if fit_probabilities is not None or minutes is not None or cases != medseg.crf_fit.CASES:
        return _usage("--fit-probabilities, --cases and --minutes go with --fit")
    if preset == "pydensecrf" and {"gaussian_sigma_mm", "bilateral_sigma_mm"} & set(given):
        return _usage("--preset pydensecrf counts pixels and takes no setting in mm")
    if parameters is not None and (given or preset != "gentle"):
        return _usage("--parameters takes no preset and no other settings")
    settings: medseg.CRFParameters | None
    if parameters is not None:
        choice = medseg.crf_fit.CRFChoice.load(parameters)
        say(choice.reason)
        settings = choice.parameters
    else:
        if preset == "pydensecrf":
            say("warning: the preset pydensecrf smooths strongly and often erases organs; compare with the unrefined")
        base = medseg.CRFParameters() if preset == "gentle" else medseg.CRFParameters.pydensecrf
        settings = replace(base, **given)
    return _refine(image, probabilities, out, settings, axis, device, json, force)


def _usage(message: str) -> int:
    say(f"medseg: error: {message}; see medseg refine --help")
    return 2


def _refine(
    image: Path, probabilities: Path, out: Path, settings: Any, axis: int, device: str, json: bool, force: bool
) -> int:
    if out.exists() and not force:
        raise FileExistsError(f"output must not exist yet, got {out}; choose another name or use --force")
    if out.suffix.lower() == ".dcm" and not medseg.io.is_dicom(image):
        raise ValueError(f"image must be a DICOM series for {out.name}, got {image}; write .nii.gz")
    scan, soft = medseg.read(image), medseg.crf_fit.read_probabilities(probabilities)
    scan.geometry.require_close(soft.geometry, f"image and probabilities {probabilities.name}")
    layers = medseg.probability_maps.layers_of(soft) if medseg.probability_maps.overlap(soft) else soft
    before = medseg.crf_fit.decided(layers)
    with bar("refining") as progress, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        progress(0)
        after = medseg.refine(scan, layers, parameters=settings, axis=axis, device=device) if settings else layers
    for one in said:
        show_warning(one.message, one.category)
    labels = medseg.crf_fit.decided(after)
    medseg.write(labels, out, source=image, force=force)
    voxel = labels.geometry.voxel_mm3
    rows = [
        {"structure": s.name, "before_mm3": float(before.mask(s.number).sum() * voxel),
         "after_mm3": float(labels.mask(s.number).sum() * voxel)}
        for s in labels.structures
    ]  # fmt: skip
    if json:
        used = asdict(settings) if settings else None
        print_json({"out": str(out), "settings": used, "structures": rows, "warnings": [str(w.message) for w in said]})
        return 0
    for row in rows:
        say(f"{row['structure']}: {row['before_mm3']:.0f} mm3 before, {row['after_mm3']:.0f} mm3 after")
    print(out)
    return 0


def _fit(
    source: Path, probabilities: Path | None, out: Path | None, cases: int, minutes: float | None, device: str,
    json: bool, force: bool,
) -> int:  # fmt: skip
    if out is not None and out.exists() and not force:
        raise FileExistsError(f"output must not exist yet, got {out}; choose another name or use --force")
    stored = medseg.crf_fit.is_run(source)
    if out is None and not stored:
        return _usage("--fit DATASET needs --out FILE.json")
    with bar("refining") as progress:
        choice = medseg.crf_fit.fit_crf(
            source, probabilities=probabilities, device=device, most=cases,
            seconds=float("inf") if minutes is None else 60 * minutes, progress=progress,
        )  # fmt: skip
    if out is not None:
        choice.save(out, force=force)
    if json:
        print_json(loads(choice.model_dump_json()))
        return 0
    table = Table("structure", "cases", "Dice without", "Dice with", "gain on held-out cases (95 % interval)")
    for g in dict.fromkeys((*choice.structures, choice.overall)):
        interval = "" if g.low is None else f" [{g.low:+.4f}, {g.high:+.4f}]"
        table.add_row(
            escape(g.structure), str(g.cases), f"{g.before:.4f}", f"{g.after:.4f}", f"{g.change:+.4f}{interval}"
        )
    print_table(table)
    print(choice.reason)
    for path in (*([source / choice.file] if stored else []), *([out] if out else [])):
        print(path)
    return 0
