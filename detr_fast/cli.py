# SPDX-License-Identifier: Apache-2.0
"""The command line: ``detr-fast train`` and ``detr-fast eval``, which ``tools/`` calls, too.

Exit codes: 0 done, 1 the training diverged, 2 a mistake of the user, 130 stopped by Ctrl-C.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from detr_fast.config import UsageError, configure, parse
from detr_fast.data.coco import DatasetError
from detr_fast.engine.build import stored_flags
from detr_fast.engine.evaluate import evaluate_checkpoint
from detr_fast.engine.log import say
from detr_fast.engine.train import TrainingDivergedError, fit
from detr_fast.models.checkpoint import CheckpointError, read_checkpoint

TRAIN = """Train DETR, and evaluate it after each epoch.

Without --coco_path it learns generated shapes, in minutes on a CPU."""
EVALUATE = """Evaluate a checkpoint: losses and COCO AP.

Model and data come from the checkpoint where it tells, else from the flags."""


def _complain(error: Exception) -> None:
    kind = type(error)
    # an error of a loader process arrives with its traceback; the last line is the message
    line = str(error).strip().splitlines()[-1]
    line = line.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")
    sys.stderr.write(f"error: {line}\n")


def _run(program: str, description: str, arguments: Sequence[str] | None, eval: bool) -> int:
    try:
        given = parse(program, description, arguments)
        if eval:
            given["eval"] = True
        checkpoint = read_checkpoint(given["resume"]) if given.get("resume") else None
        config = configure(given, stored_flags(checkpoint) if checkpoint else None)
        say(config.headline())
        say(str(config))
        if checkpoint and config.eval:
            evaluate_checkpoint(config, checkpoint)
            return 0
        return fit(config, checkpoint)
    except (UsageError, DatasetError, CheckpointError, ImportError) as error:
        _complain(error)
        return 2
    except TrainingDivergedError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def train(arguments: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run ``tools/train.py``; return its exit code."""
    return _run(program, TRAIN, arguments, eval=False)


def evaluate(arguments: Sequence[str] | None = None, program: str = "eval.py") -> int:
    """Run ``tools/eval.py``; return its exit code."""
    return _run(program, EVALUATE, arguments, eval=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``detr-fast``; return its exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "train":
        return train(rest, program="detr-fast train")
    if command == "eval":
        return evaluate(rest, program="detr-fast eval")
    if command == "--version":
        say(version("detr-fast"))
        return 0
    if command in ("-h", "--help"):
        say("usage: detr-fast {train,eval} [flags]; flags: detr-fast train --help")
        return 0
    _complain(UsageError(f"detr-fast: expected train or eval, got {command!r}"))
    return 2
