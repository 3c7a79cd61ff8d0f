"""The command line: each command is one function of a few lines on medseg's public names.

Results go to stdout, progress and messages to stderr. Exit code 0 is success, 1 bad input (one line says what, and
``--debug`` shows the traceback), 2 bad usage, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

import medseg

Device = Annotated[str, arg(metavar="auto|cpu|cuda[:n]")]
ERR = Console(stderr=True)


def demo(out: Path = Path("medseg-demo"), *, device: Device = "auto", seed: int = 0, force: bool = False) -> None:
    """Run the main job end to end on a brain MR that pip installed: DICOM in, train, predict, contours out, report.

    Args:
        out: folder for everything that is written
        device: where to compute
        seed: of weights and sampling
        force: replace the folder of a former demo
    """
    result = medseg.demo.run_demo(out, device=device, seed=seed, force=force)
    print(result)


def info(path: Positional[Path], *, json: bool = False) -> None:
    """Show what is in a file, DICOM folder, zip or folder of images: series, geometry, quirks.

    Args:
        path: an image, a DICOM folder, zip or DICOMDIR, or a folder of images
        json: print JSON
    """
    volumes = medseg.list_series(path)
    if json:
        _print_json({"volumes": [v.to_json() for v in volumes]})
        return
    table = Table("series", "description", "modality", "shape", "spacing (mm)", "quirks")
    for v in volumes:
        spacing = " x ".join(f"{s:.4g}" for s in v.spacing_mm)
        table.add_row(
            v.name or v.series or Path(v.path).name, v.description, v.modality, " x ".join(map(str, v.shape)), spacing,
            "\n".join(v.quirks),
        )  # fmt: skip
    _print(table)


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
    with _bar("checking") as progress:
        checkup = medseg.check(dataset, fix=fix, group=group, progress=progress)
    print(checkup.to_json() if json else checkup)
    return 1 if checkup.errors else 0


def plan(
    dataset: Positional[Path],
    *,
    out: Path | None = None,
    model: str | None = None,
    fold: int | None = None,
    folds: int = 5,
    group: str | None = None,
    device: Device = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Look at a data set and plan its training, with a reason for each choice.

    Args:
        dataset: a folder with images/ and labels/, a Decathlon or nnU-Net folder, or a CSV
        out: write the plan as JSON, to be edited and given to train --plan
        model: a model of the table; by default 2D or 3D U-Net as the images are
        fold: plan on the training cases of this fold alone
        folds: number of folds
        group: regular expression whose group 1 on the case id is the patient
        device: where it will be trained
        json: print JSON
        force: overwrite out
    """
    found = medseg.load_dataset(dataset, group=group)
    cases = None
    if fold is not None:
        parts = medseg.data.labelled_folds(found, folds)
        if not 0 <= fold < folds:
            raise ValueError(f"fold must be 0 to {folds - 1}, got {fold}")
        cases = parts[fold][0]
    with _bar("planning") as progress:
        made = medseg.make_plan(
            found, cases, model=model, device=str(medseg.device.pick_device(device)), progress=progress
        )
    if out:
        made.save(out, force=force)
    if json:
        print(made.model_dump_json(indent=1))
        return
    table = Table("what", "value", "why")
    for name, value in made.summary().items():
        table.add_row(name, value, made.reasons.get(name, ""))
    _print(table)


def train(
    dataset: Positional[Path],
    *,
    out: Path,
    model: str | None = None,
    fold: int = 0,
    folds: int = 5,
    epochs: int | None = None,
    minutes: float | None = None,
    batch: int | None = None,
    learning_rate: float = 2e-3,
    group: str | None = None,
    plan: Path | None = None,
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    workers: int = 2,
    device: Device = "auto",
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Train a model and validate it on whole cases; everything lands in one run folder.

    Args:
        dataset: a folder with images/ and labels/, a Decathlon or nnU-Net folder, or a CSV
        out: run folder
        model: a model of the table; by default 2D or 3D U-Net as the images are
        fold: which fold is held out for validation
        folds: number of folds
        epochs: length in epochs (100 when neither this nor minutes is given)
        minutes: length in minutes, reading and validation included
        batch: patches per step; the plan's by default
        learning_rate: at its highest
        group: regular expression whose group 1 on the case id is the patient
        plan: plan.json to use instead of planning
        precision: auto tries which is faster on a CPU
        workers: threads that read and preprocess
        device: where to compute
        seed: of weights and sampling
        resume: go on from the last checkpoint
        force: replace an existing run folder
        json: print the validation as JSON
    """
    config = medseg.TrainConfig.make(
        dataset=dataset, out=out, model=model, fold=fold, folds=folds, epochs=epochs, minutes=minutes, batch=batch,
        learning_rate=learning_rate, group=group, plan=plan, precision=precision, workers=workers, device=device,
        seed=seed, resume=resume, force=force,
    )  # fmt: skip
    run = medseg.train(config)
    _show(run.evaluation(), json)
    if not json:
        print(f"run: {run.path}\nreport: {run.path / 'report.html'}")


def predict(
    run: Positional[Path],
    inputs: Positional[list[Path]],
    *,
    out: Path,
    to: Annotated[str, arg(metavar="nifti,nrrd,seg,rtstruct")] = "nifti",
    probabilities: bool = False,
    crf: bool = False,
    series: str | None = None,
    device: Device = "auto",
    force: bool = False,
) -> int:
    """Predict files, folders of files or DICOM series with a trained run.

    Exit code 1 when an input could not be predicted; the others are.

    Args:
        run: run folder of a training
        inputs: image files, folders of image files, DICOM folders
        out: folder for the label maps
        to: formats, separated by commas; seg and rtstruct need a DICOM series
        probabilities: write the probabilities too
        crf: refine slice by slice before the decision, as fitted on validation where the run says so
        series: SeriesInstanceUID, number or name of the one series wanted of a DICOM folder
        device: where to compute
        force: overwrite outputs
    """
    opened = medseg.Run.open(run)
    parameters = medseg.crf_fit.crf_of_run(opened) if crf else None
    predictor = medseg.Predictor.load(opened, device)
    images = medseg.batch.find_inputs(inputs, len(opened.plan.channels), series)
    formats = tuple(name.strip() for name in to.split(","))
    with _bar("predicting") as progress:
        done = medseg.batch.predict_files(
            predictor, images, out, to=formats, probabilities=probabilities, crf=parameters, force=force,
            progress=progress,
        )  # fmt: skip
    for files in done.written.values():
        for path in files:
            print(path)
    for reason in done.failed.values():
        _say(f"medseg: error: {reason}")
    return 1 if done.failed else 0


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
    with _bar("evaluating") as progress:

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
    _show(found, json, [] if other is None else medseg.statistics.compare(other, found))
    return 1 if found.failed else 0


COMMANDS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (demo, info, convert, check, plan, train, predict, refine, evaluate)
}


def main() -> None:
    """Entry point of the command ``medseg``."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if arguments == ["--version"]:
        print(f"medseg {medseg.__version__}")
        return
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("medseg").setLevel(logging.INFO)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        try:
            code = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="medseg", args=arguments, config=(FlagCreatePairsOff,),
                description="Medical image segmentation, from a scan to contours. --debug shows tracebacks; --version.",
            )  # fmt: skip
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except KeyboardInterrupt:
        _say("medseg: stopped")
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes there
        sys.exit(1)
    except Exception as problem:  # noqa: BLE001  the one place where an error becomes a line
        if debug:
            traceback.print_exc()
        expected = isinstance(problem, ValueError | TypeError | OSError)
        kind = "" if expected else f"{type(problem).__name__}: "
        _say(f"medseg: error: {kind}{problem}")
        sys.exit(1)
    sys.exit(code or 0)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    ours = issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning)
    if ours:
        _say(f"warning: {message}")


def _say(line: str) -> None:
    ERR.print(line, markup=False, highlight=False, soft_wrap=True)


def _print(table: Table) -> None:
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _show(evaluation: Any, json: bool, comparisons: Sequence[Any] = ()) -> None:
    """Print an Evaluation, and how it compares with another, as JSON or as tables."""
    if json:
        _print_evaluation(evaluation, comparisons)
        return
    table = Table("structure", "cases", "IoU", "Dice", "HD95 (mm)", "NSD")
    for row in evaluation.summary:
        cells = [f"{row[m]['mean']:.3f} [{row[m]['ci95'][0]:.3f}, {row[m]['ci95'][1]:.3f}]" for m in METRICS]
        table.add_row(row["structure"], str(row["n_defined"]), *cells)
    _print(table)
    for row in evaluation.failed:
        _say(f"{row['case']}: {row['error']}")
    if comparisons:
        table = Table("structure", "pairs", "Dice of --compare", "Dice", "difference", "p (Wilcoxon, Holm)")
        for c in comparisons:
            change = f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
            table.add_row(c.structure, str(c.n), f"{c.first:.3f}", f"{c.second:.3f}", change, f"{c.p_holm:.3g}")
        _print(table)


def _print_evaluation(evaluation: Any, comparisons: Sequence[Any]) -> None:
    """The JSON of an Evaluation, with the key "comparison" where there is one; NaN is null."""
    if not comparisons:
        print(evaluation.to_json())
        return
    rows = [{key: None if v != v else v for key, v in asdict(c).items()} for c in comparisons]
    _print_json({**json.loads(evaluation.to_json()), "comparison": rows})


METRICS = ("iou", "dice", "hd95_mm", "nsd")


@contextmanager
def _bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; gives a function of done and total."""
    with Progress(console=ERR, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
