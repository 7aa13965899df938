# SPDX-License-Identifier: Apache-2.0
"""The command line ``detr-fast``, whose commands ``tools/`` calls, too.

Exit codes: 0 done, 1 the training diverged, 2 a mistake of the user (also a full disk or too little
GPU memory), 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import io
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import torch

from detr_fast.command_line import parse
from detr_fast.config import Config, UsageError, configure, output_dir
from detr_fast.data.annotations import DatasetError
from detr_fast.engine.build import stored_flags
from detr_fast.engine.check import check_data
from detr_fast.engine.dry_run import dry_run
from detr_fast.engine.evaluate import evaluate_checkpoint
from detr_fast.engine.log import say
from detr_fast.engine.metrics import TrainingDivergedError
from detr_fast.engine.profile import FLAGS, Options, profile
from detr_fast.engine.resume import newest_checkpoint
from detr_fast.engine.train import fit
from detr_fast.models.checkpoint import CheckpointError, read_checkpoint
from detr_fast.report import command as reports

# what a user can mend; OSError: a folder that cannot be written, a full disk
MISTAKES = (
    UsageError,
    DatasetError,
    CheckpointError,
    ImportError,
    OSError,
    torch.cuda.OutOfMemoryError,
)

TRAIN = """Train DETR, and evaluate it after each epoch.

Without --coco_path it learns generated shapes, in minutes on a CPU."""
EVALUATE = """Evaluate a checkpoint: losses and COCO AP.

Model and data come from the checkpoint where it tells, else from the flags."""
PROFILE = """Train for some steps, write nothing, and tell where their time went.

Flags are those of training: a profile is of that run, on its own data."""

Checkpoint = dict[str, Any] | None


def _complain(error: BaseException) -> None:
    kind = type(error)
    # an error of a loader process arrives with its traceback; the last line is the message
    line = (str(error).strip() or kind.__name__).splitlines()[-1]
    line = line.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")
    sys.stderr.write(f"error: {line}\n")


def _start(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The flags with ``--resume auto`` resolved, and the checkpoint that they name.

    Beside it ``--finetune`` names what a run starts from that there is not yet.
    """
    if given.get("resume") == "auto":
        given = dict(given)
        start = {"finetune": given.pop("finetune")} if "finetune" in given else {}
        folder = output_dir(given)
        if not folder:
            raise UsageError("--resume auto looks into --output_dir: name the folder of the run")
        if found := newest_checkpoint(folder):
            return {**given, "resume": str(found[0])}, found[1]
        del given["resume"]
        given |= start
    source = given.get("resume") or given.get("finetune")
    return given, read_checkpoint(source) if source else None


def _train_or_evaluate(config: Config, checkpoint: Checkpoint, _: dict[str, Any]) -> int:
    if config.check_data:
        check_data(config)
        return 0
    if config.dry_run:
        dry_run(config, checkpoint)
        return 0
    if checkpoint and config.eval:
        evaluate_checkpoint(config, checkpoint)
        return 0
    return fit(config, checkpoint)


def _profile(config: Config, checkpoint: Checkpoint, options: dict[str, Any]) -> int:
    if config.eval or config.check_data or config.dry_run:
        raise UsageError("--eval, --check_data, --dry_run: leave them out of a profile")
    say(profile(config, checkpoint, Options(**options)).table())
    return 0


def _ends_well(work: Callable[[], int], *, debug: bool) -> int:
    """Do ``work``; a mistake of the user ends in one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # class names that it cannot show are no error
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except (*MISTAKES, TrainingDivergedError) as error:
        if debug:
            traceback.print_exc()
        _complain(error)
        return 1 if isinstance(error, TrainingDivergedError) else 2
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        if debug:
            traceback.print_exc()
        reason = str(error).splitlines()[0]
        _complain(UsageError(f"{reason}: lower --num_workers, or give it more (shared) memory"))
        return 2


def _run(
    program: str,
    description: str,
    arguments: Sequence[str] | None,
    work: Callable[[Config, Checkpoint, dict[str, Any]], int] = _train_or_evaluate,
    *,
    eval: bool = False,
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> int:
    """A command that takes the flags of training, and ``more``."""
    line = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        given = parse(program, description, line, more)
        options = {name: given.pop(name) for name in more if name in given}
        if eval:
            given["eval"] = True
        given, checkpoint = _start(given)
        config = configure(given, stored_flags(checkpoint) if checkpoint else None)
        say(config.headline())
        say(str(config))
        return work(config, checkpoint, options)

    return _ends_well(run, debug="--debug" in line)


def _run_own(module: str, program: str, arguments: Sequence[str] | None) -> int:
    """A command with flags of its own, which ``module`` describes and does.

    The module has ``parser(program)``, which returns a `detr_fast.command_line.Parser`,
    and ``run(options)``, which takes what it parsed and returns the exit code. It is imported
    when it is asked for: no command waits for the libraries of another.
    """
    line = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        command = import_module(module)
        parser = command.parser(program)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        options = parser.parse_args(line)
        del options.debug
        return command.run(options)

    return _ends_well(run, debug="--debug" in line)


def train(arguments: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run ``tools/train.py``; return its exit code."""
    return _run(program, TRAIN, arguments)


def evaluate(arguments: Sequence[str] | None = None, program: str = "eval.py") -> int:
    """Run ``tools/eval.py``; return its exit code."""
    return _run(program, EVALUATE, arguments, eval=True)


def profile_step(arguments: Sequence[str] | None = None, program: str = "profile_step.py") -> int:
    """Run ``tools/profile_step.py``; return its exit code."""
    return _run(program, PROFILE, arguments, _profile, more=FLAGS)


def predict(arguments: Sequence[str] | None = None, program: str = "predict.py") -> int:
    """Run ``tools/predict.py``; return its exit code."""
    return _run_own("detr_fast.predict.command", program, arguments)


def convert(arguments: Sequence[str] | None = None, program: str = "convert_checkpoint.py") -> int:
    """Run ``tools/convert_checkpoint.py``; return its exit code."""
    return _run_own("detr_fast.convert", program, arguments)


def export(arguments: Sequence[str] | None = None, program: str = "export.py") -> int:
    """Run ``tools/export.py``; return its exit code."""
    return _run_own("detr_fast.export.command", program, arguments)


def report(arguments: Sequence[str] | None = None, program: str = "report.py") -> int:
    """Run ``tools/report.py``; return its exit code."""
    line = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        given = parse(program, reports.DESCRIPTION, line, reports.FLAGS)
        options = {name: given.pop(name) for name in reports.FLAGS if name in given}
        reports.report(given, reports.Options(**options))
        return 0

    return _ends_well(run, debug="--debug" in line)


COMMANDS = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "convert": convert,
    "export": export,
    "report": report,
    "profile": profile_step,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``detr-fast``; return its exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in COMMANDS:
        return COMMANDS[command](rest, program=f"detr-fast {command}")
    names = list(COMMANDS)
    if command == "--version":
        say(version("detr-fast"))
        return 0
    if command in ("-h", "--help"):
        say(f"usage: detr-fast {{{','.join(names)}}} [flags]; flags: detr-fast train --help")
        return 0
    expected = f"{', '.join(names[:-1])} or {names[-1]}"
    _complain(UsageError(f"detr-fast: expected {expected}, got {command!r}"))
    return 2
