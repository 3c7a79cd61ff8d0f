"""Commands about data: info, convert, check, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table
from tyro.conf import Positional, arg

import medseg
from medseg.cli.show import Device, bar, print_json, print_table

__all__ = ["check", "convert", "info", "plan"]


def info(path: Positional[Path], *, json: bool = False) -> None:
    """Show what is in a file, DICOM folder, zip or folder of images: series, geometry, quirks.

    Args:
        path: an image, a DICOM folder, zip or DICOMDIR, or a folder of images
        json: print JSON
    """
    volumes = medseg.list_series(path)
    if json:
        print_json({"volumes": [v.to_json() for v in volumes]})
        return
    table = Table("series", "description", "modality", "shape", "spacing (mm)", "quirks")
    for v in volumes:
        spacing = " x ".join(f"{s:.4g}" for s in v.spacing_mm)
        table.add_row(
            v.name or v.series or Path(v.path).name, v.description, v.modality, " x ".join(map(str, v.shape)), spacing,
            "\n".join(v.quirks),
        )  # fmt: skip
    print_table(table)


def convert(
    src: Positional[Path],
    dst: Positional[str],
    *,
    series: str | None = None,
    like: Path | None = None,
    labels: bool = False,
    to: Literal["nifti", "nrrd", "dicom", "seg", "rtstruct"] | None = None,
    split: bool = False,
    four_d: Annotated[bool, arg(name="4d")] = False,
    resample: bool = False,
    slices: bool = False,
    suv: bool = False,
    seg_type: Literal["binary", "labelmap", "fractional"] = "binary",
    allow_mismatch: bool = False,
    show_patient: bool = False,
    force: bool = False,
) -> None:
    """Convert images (DICOM, NIfTI, NRRD, MHA) and label maps (these, DICOM-SEG, RTSTRUCT) into one another.

    Args:
        src: image, label map, or DICOM folder
        dst: a file, or a folder (ending in "/") that gets one file per volume
        series: SeriesInstanceUID, number or name of the one series wanted
        like: source series or image whose grid the labels lie on
        labels: src is a label map
        to: format, where the suffix of dst does not say
        split: write one mask per label, <number>_<label>.nii.gz
        four_d: write a time series as one 4D file
        resample: put unevenly spaced slices on a regular grid
        slices: write what is no volume as separate slices
        suv: convert PET to standardised uptake values (body weight)
        seg_type: kind of DICOM-SEG to write
        allow_mismatch: accept labels of another frame of reference
        show_patient: put patient names and ids into messages and file names
        force: overwrite outputs
    """
    written = medseg.convert(
        src, dst, series=series, like=like, labels=labels, to=to, split=split, four_d=four_d, resample=resample,
        slices=slices, suv=suv, seg_type=seg_type, allow_mismatch=allow_mismatch, show_patient=show_patient, force=force,
    )  # fmt: skip
    for path in written:
        print(path)


def check(dataset: Positional[Path], *, fix: Path | None = None, group: str | None = None, json: bool = False) -> int:
    """Look for what would spoil a training: grids, labels, values, duplicates, patients on both sides of a split.

    Exit code 1 when an error is found.

    Args:
        dataset: a folder with images/ and labels/, a Decathlon or nnU-Net folder, or a CSV
        fix: write a repaired copy and a log of every repair into this new folder
        group: regular expression whose group 1 on the case id is the patient
        json: print JSON
    """
    with bar("checking") as progress:
        checkup = medseg.check(dataset, fix=fix, group=group, progress=progress)
    print(checkup.to_json() if json else checkup)
    return 1 if checkup.errors else 0


def plan(
    dataset: Positional[Path],
    *,
    out: Path | None = None,
    model: str | None = None,
    memory: str | None = None,
    minutes: float | None = None,
    overlapping: bool = False,
    foreground: bool = False,
    set: Annotated[tuple[str, ...], arg(metavar="ENTRY=VALUE ...")] = (),
    fold: int | None = None,
    folds: int | None = None,
    split_seed: int = 12345,
    absent: Literal["background", "unknown"] = "background",
    group: str | None = None,
    device: Device = "auto",
    workers: int = 2,
    json: bool = False,
    force: bool = False,
) -> None:
    """Look at a data set and plan its training for the memory and the time there is, with a reason for each choice.

    Args:
        dataset: a folder with images/ and labels/, a Decathlon or nnU-Net folder, or a CSV
        out: write the plan as JSON, to be edited and given to train --plan
        model: a model of the table; by default 2D or 3D U-Net as the images are
        memory: what training may take, like 4GB; by default half of the free memory, or 85 % of the GPU's
        minutes: time there will be for the training; decides batch and width by a quick timing on this machine
        overlapping: give each structure a probability of its own, even where labels exclude each other
        foreground: learn all labels as one structure, where each number is an instance (a nucleus, a lesion)
        set: entries of the plan set by hand, like batch=4 spacing=1,1,3 features=16,32,64,128 mirror=[]
        fold: plan on the training cases of this fold alone
        folds: number of folds; 5, or as many as there are patients if fewer
        split_seed: of the shuffle that makes the folds
        absent: what it means that a case lacks a label: that there is nothing of it, or that nobody drew it
        group: regular expression whose group 1 on the case id is the patient
        device: where it will be trained
        workers: threads that read cases
        json: print JSON
        force: overwrite out
    """
    found = medseg.load_dataset(dataset, group=group, absent=absent)
    if foreground:
        found = medseg.plan.united(found)
    cases = None
    if fold is not None:
        labelled = [c for c in found.cases if c.label is not None]
        count = folds or min(5, len({c.group for c in labelled}))
        if not 0 <= fold < count:
            raise ValueError(f"fold must be 0 to {count - 1}, got {fold}")
        cases = medseg.data.folds(labelled, count, split_seed)[fold][0]
    spacing = medseg.plan.chosen_setting(set, "spacing")  # patch and poolings depend on it
    with bar("planning") as progress:
        made = medseg.make_plan(
            found, cases, model=model, device=str(medseg.device.pick_device(device)), memory=memory, minutes=minutes,
            spacing=spacing, overlapping=overlapping, workers=workers, progress=progress,
        )  # fmt: skip
    made = made.with_settings(set)
    if out:
        made.save(out, force=force)
    if json:
        print(made.model_dump_json(indent=1))
        return
    table = Table("what", "value", "why")
    for name, value in made.summary().items():
        table.add_row(name, value, made.reasons.get(name, ""))
    print_table(table)
