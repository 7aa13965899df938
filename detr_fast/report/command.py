# SPDX-License-Identifier: Apache-2.0
"""``tools/report.py``: runs evaluated and put into one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from detr_fast.atomic_file import write_whole
from detr_fast.config import UsageError, configure
from detr_fast.data.coco import CocoAnnotations
from detr_fast.engine.build import stored_flags
from detr_fast.engine.evaluate import Evaluated
from detr_fast.engine.log import read_log, say
from detr_fast.engine.resume import newest_checkpoint
from detr_fast.evaluation.analysis import find_errors
from detr_fast.models.checkpoint import read_checkpoint
from detr_fast.report.page import Run, Scored, page
from detr_fast.report.pictures import worst_pictures
from detr_fast.visualize.canvas import run_names

DESCRIPTION = """Put runs into one HTML page: curves, AP, confused classes, the worst images.

A run is a folder of tools/train.py, whose best checkpoint is evaluated, or a checkpoint. Model and
data come from there; the flags of tools/eval.py hold for all runs."""

# of the command line, beside those of training
FLAGS: dict[str, dict[str, Any]] = {
    "runs": {"nargs": "+", "metavar": "RUN", "help": "folders of runs, or checkpoints"},
    "threshold": {
        "type": float,
        "metavar": "X",
        "help": "the least score of what is counted and drawn (0.5)",
    },
    "worst": {"type": int, "metavar": "N", "help": "images to draw for each run (12)"},
}


class Options(NamedTuple):
    """What a report is told beside the flags of the evaluation."""

    runs: tuple[str, ...] = ()
    threshold: float = 0.5
    worst: int = 12

    def checked(self) -> Options:
        """Itself.

        Raises:
            UsageError: if there is no run, one is named twice, or a number is out of range.
        """
        if not self.runs:
            raise UsageError("--runs: name one: outputs/shapes, which `uv run tools/train.py` made")
        places = [Path(run).resolve() for run in self.runs]
        for place, run in zip(places, self.runs, strict=True):
            if places.count(place) > 1:
                raise UsageError(f"--runs: {run} is named twice")
            if not place.exists():
                raise UsageError(f"--runs: {run}: no such folder or checkpoint")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold:g}: expected 0 to 1")
        if self.worst < 0:
            raise UsageError(f"--worst {self.worst}: expected at least 0")
        return self


def report(given: dict[str, Any], options: Options) -> Path:
    """Evaluate the runs, and write ``report.html``.

    Args:
        given (dict): the flags of the command line that are those of an evaluation. Without
            ``output_dir`` the page lies in the folder of the first run.
        options (Options): the others.

    Returns:
        Path: the page.

    Raises:
        UsageError: a flag has no place in a report, or a run holds nothing to report.
    """
    options = options.checked()
    for name in ("resume", "finetune", "check_data", "dry_run", "save_json", "per_class"):
        if name in given:
            raise UsageError(f"--{name}: leave it out of a report, whose runs --runs names")
    places = [Path(run).resolve() for run in options.runs]
    folders = [place if place.is_dir() else place.parent for place in places]
    folder = Path(given.pop("output_dir", "") or folders[0])
    folder.mkdir(parents=True, exist_ok=True)
    names = run_names(places)
    runs = [_run(name, place, given, options) for name, place in zip(names, places, strict=True)]
    path = folder / "report.html"
    write_whole(path, page(runs, options.threshold).encode())
    say(f"{path}: {', '.join(names)}")
    return path


def _run(name: str, place: Path, given: dict[str, Any], options: Options) -> Run:
    """What there is of a run."""
    folder = place if place.is_dir() else place.parent
    log = folder / "log.txt"
    try:
        records = [r for r in read_log(log) if "epoch" in r] if log.exists() else []
    except ValueError as error:
        raise UsageError(
            f"--runs {folder}: its log.txt is that of something else ({error})"
        ) from error
    if place.is_file():
        found = place, read_checkpoint(place)
    elif (best := place / "checkpoint_best.pth").exists():
        found = best, read_checkpoint(best)
    else:
        found = newest_checkpoint(place)
    if not found and not records:
        raise UsageError(
            f"--runs {place}: there is neither a checkpoint nor a log.txt with an epoch: name a "
            "folder of tools/train.py, or a checkpoint"
        )
    return Run(name, records, _scored(*found, given, options) if found else None)


def _scored(
    file: Path, checkpoint: dict[str, Any], given: dict[str, Any], options: Options
) -> Scored:
    """The evaluation of a checkpoint, taken apart."""
    config = configure({**given, "resume": str(file), "eval": True}, stored_flags(checkpoint))
    say(config.headline())
    evaluated = Evaluated.of(config, checkpoint)
    result = evaluated.score(config).result
    dataset = evaluated.batches.loader.dataset
    truth = CocoAnnotations.from_dict(dataset.ground_truth, "ground truth")
    errors = find_errors(truth, result, options.threshold)
    return Scored(
        file=file,
        epoch=checkpoint.get("epoch"),
        result=result,
        truth=truth,
        errors=errors,
        pictures=worst_pictures(dataset, result, errors.images[: options.worst], options.threshold),
    )
