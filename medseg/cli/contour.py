"""The command that contours structures from boxes, points and logs of earlier sessions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

import medseg
from medseg.cli.show import Device, bar, print_json, say

__all__ = ["contour"]

Named = Annotated[tuple[str, ...], arg(metavar="[NAME=]NUMBERS")]
SIZE = re.compile(r"([\d.]+)\s*([KMGT]?)I?B?", re.IGNORECASE)
UNITS_OF_SIZE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def contour(
    image: Positional[Path],
    *,
    out: Path,
    box: UseAppendAction[Named] = (),
    point: UseAppendAction[Named] = (),
    units: Literal["mm", "voxel"] = "voxel",
    single: bool = False,
    model: str = "lite-medsam",
    checkpoint: Path | None = None,
    window: str | None = None,
    axis: str | None = None,
    replay: Path | None = None,
    cache: Path | None = None,
    cache_size: str = "2GB",
    series: str | None = None,
    device: Device = "auto",
    json: bool = False,
    force: bool = False,
) -> int:
    """Contour structures of an image from boxes or points, and follow them through the volume.

    Voxels are counted from 0 along the axes i, j, k of the image as medseg info shows it, and a box includes both of its
    corners. Millimetres are RAS+ world coordinates (x to the patient's right, y to the front, z to the head); DICOM and
    some viewers show LPS, where x and y have the other sign. Beside OUT a log of the prompts is written for --replay.

    Args:
        image: a file or DICOM folder
        out: label map to write: .nii.gz, .nrrd; .seg.dcm or .rtstruct.dcm with a DICOM image
        box: x0,y0,z0,x1,y1,z1; flat along one axis (z0 = z1, say) it lies on a slice and the structure is followed from
            there, else it bounds the structure. Four numbers x0,y0,x1,y1 on a picture. Repeat for more structures,
            NAME=... names them. Begin with = or a name where the first number is negative: --box=-10,...
        point: x,y,z,+ in the structure or x,y,z,- outside of it, for models that take points (not lite-medsam)
        units: of boxes and points
        single: stay on the slices of flat boxes and points
        model: lite-medsam, medsam, sam-vit-b, sam-vit-l, sam-vit-h, mobile-sam, or a run folder
        checkpoint: file with the weights, where the model needs one
        window: soft-tissue, lung, mediastinum, bone, brain, liver, head-neck, stroke, angiography, percentile, or LOW,HIGH
        axis: slices are across it: axial, coronal, sagittal, or 0, 1, 2
        replay: log of earlier prompts, given again before those of the command line
        cache: folder that keeps embeddings of slices for the next call; by default memory
        cache_size: what it may take
        series: SeriesInstanceUID, number or name of the one series wanted of a DICOM folder
        device: where to compute
        json: print JSON
        force: overwrite out and its log
    """
    if not box and not point and replay is None:
        say("medseg: error: --box, --point or --replay is needed; see medseg contour --help")
        return 2
    log = _log_path(out)
    for path in (out, log):
        if path.exists() and not force:
            raise FileExistsError(f"output must not exist yet, got {path}; choose another name or use --force")
    scan = medseg.read(image, series)
    if out.name.lower().endswith(".dcm") and not scan.meta.get("series_uid"):
        raise ValueError(
            f"image must be a DICOM series for a DICOM output, got {image}; write NIfTI, or read the series"
        )
    session = medseg.PromptSession(
        scan, model, checkpoint=checkpoint, window=window, axis=int(axis) if axis and axis.isdigit() else axis,
        cache=medseg.embeddings.EmbeddingCache(cache, _bytes(cache_size)), device=device,
    )  # fmt: skip
    say(f"model {session.model.name}, window {session.window}, {session.planes.name} slices")
    if replay is not None:
        session.replay(replay)
    _give(session, box, point, units, not single)
    with bar("contouring") as progress:
        labels = session.labels(progress)
    empty = [s.name for s in labels.structures if not labels.mask(s.number).any()]
    if empty:
        raise ValueError(f"prompts must show something, got no voxel of {', '.join(empty)}; draw another box")
    medseg.write(labels, out, source=image, series=series, force=force)
    session.log.save(log, force=force)
    _report(labels, session, out, log, json)
    return 0


def _give(session: Any, boxes: tuple[str, ...], points: tuple[str, ...], units: Any, spread: bool) -> None:
    """Give the prompts of the command line; those without a name are structure 1, 2, ... (points: of the last box)."""
    last = ""
    for count, text in enumerate(boxes, start=1):
        name, numbers = _parts(text)
        last = name or f"structure {count}"
        session.box(last, [_number(n, text) for n in numbers], units=units, spread=spread)
    for text in points:
        name, numbers = _parts(text)
        sign = numbers.pop() if numbers and numbers[-1] in ("+", "-") else "+"
        place = [_number(n, text) for n in numbers]
        session.point(name or last or "structure 1", place, inside=sign == "+", units=units, spread=spread)


def _parts(text: str) -> tuple[str, list[str]]:
    name, _, numbers = text.rpartition("=")
    return name.strip(), [n.strip() for n in numbers.split(",")]


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as problem:
        raise ValueError(f"box or point must be numbers separated by commas, got {whole!r}") from problem


def _bytes(text: str) -> int:
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cache size must be a number like 500MB or 2GB, got {text!r}")
    return int(float(match[1]) * UNITS_OF_SIZE[match[2].upper()])


def _log_path(out: Path) -> Path:
    """Where the log of the prompts goes: the name of the output without its suffixes, and .prompts.json."""
    stem = re.sub(r"(\.nii\.gz|\.(seg|rtstruct)\.dcm|\.[^.]+)$", "", out.name, flags=re.IGNORECASE)
    return out.with_name(f"{stem}.prompts.json")


def _report(labels: Any, session: Any, out: Path, log: Path, json: bool) -> None:
    axis, voxel = session.planes.axis, labels.geometry.voxel_mm3
    rows = []
    for s in labels.structures:
        mask = labels.mask(s.number)
        used = [n for n in range(mask.shape[axis]) if mask.take(n, axis).any()]
        rows.append({"structure": s.name, "volume_mm3": float(mask.sum() * voxel), "slices": [used[0], used[-1]]})
    if json:
        window = {"name": session.window.name, "low": session.window.low, "high": session.window.high}
        print_json({
            "out": str(out), "log": str(log), "model": session.model.name, "window": window,
            "slices": session.planes.name, "axis": axis, "structures": rows,
        })  # fmt: skip
        return
    for row in rows:
        first, final = row["slices"]
        say(f"{row['structure']}: {row['volume_mm3'] / 1000:.1f} ml, slices {first} to {final}")
    print(out)
    print(log)
