# SPDX-License-Identifier: Apache-2.0
"""Curves and pictures of a run for TensorBoard, Weights & Biases and MLflow (``--loggers``)."""

import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from detr_fast.atomic_file import write_whole
from detr_fast.config import UsageError
from detr_fast.engine.log import say

PROJECT = "detr_fast"
IDS = "loggers.json"  # of the runs in the output folder, so that --resume goes on with them


class Logger(Protocol):
    """Where a run is looked at."""

    id: str  # by which the service finds the run again; "" if it needs none

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers; ``step`` counts forward passes."""

    def picture(self, name: str, file: Path, step: int) -> None:
        """Take a PNG."""

    def close(self) -> None:
        """Send what is left."""


class _TensorBoard:
    """Event files in ``tensorboard/`` of the output folder."""

    id = ""

    def __init__(self, folder: Path, config: Mapping[str, Any], earlier: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted run wrote after its last checkpoint is hidden
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step or None)
        rows = "".join(f"|{name}|{value}|\n" for name, value in config.items())
        self._writer.add_text("flags", "|flag|value|\n|---|---|\n" + rows, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, name: str, file: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of ``wandb``, whose own settings (``WANDB_PROJECT``, ``WANDB_MODE``, ...) hold."""

    def __init__(self, folder: Path, config: Mapping[str, Any], earlier: str, step: int) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            id=earlier or None,
            resume="allow" if earlier else None,
        )
        self.id = str(self._run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, whose own settings (``MLFLOW_TRACKING_URI``, ...) hold."""

    def __init__(self, folder: Path, config: Mapping[str, Any], earlier: str, step: int) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if earlier:
            run = self._mlflow.start_run(run_id=earlier)
        else:
            self._mlflow.set_experiment(PROJECT)
            run = self._mlflow.start_run(run_name=folder.name)
            self._mlflow.log_params({name: str(value) for name, value in config.items()})
        self.id = str(run.info.run_id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self._mlflow.log_artifact(str(file))

    def close(self) -> None:
        self._mlflow.end_run()


KINDS: dict[str, Callable[[Path, Mapping[str, Any], str, int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
EXTRAS = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow"}


class Loggers:
    """All loggers of a run. One that fails is named and left out from then on: training goes on.

    Args:
        names (list[str]): of `KINDS`.
        folder (Path | None): the output folder; loggers need one.
        config (Mapping): the flags.
        step (int): forward passes done before, in the run that is resumed; else 0.

    Raises:
        UsageError: if a name is unknown, a library is missing, there is no output folder, or a
            service does not let the run begin.
    """

    def __init__(
        self, names: list[str], folder: Path | None, config: Mapping[str, Any], step: int = 0
    ) -> None:
        self._loggers: dict[str, Logger] = {}
        if not names:
            return
        if folder is None:
            raise UsageError("--loggers needs --output_dir")
        ids = _earlier(folder / IDS) if step else {}
        for name in names:
            try:
                self._loggers[name] = KINDS[name](folder, config, ids.get(name, ""), step)
            except ImportError as error:
                raise UsageError(
                    f'--loggers {name} needs a library ({error}): pip install "detr-fast'
                    f'[{EXTRAS[name]}]"'
                ) from error
            except Exception as error:  # of a service: no login, no network
                raise UsageError(f"--loggers {name}: {error}") from error
        ids = {name: logger.id for name, logger in self._loggers.items() if logger.id}
        if ids:
            write_whole(folder / IDS, json.dumps(ids, indent=2).encode())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to all."""
        self._all(lambda logger: logger.scalars(values, step))

    def picture(self, name: str, file: Path, step: int) -> None:
        """Send a PNG to all, if it is there."""
        if file.is_file():
            self._all(lambda logger: logger.picture(name, file, step))

    def close(self) -> None:
        """Send what is left."""
        self._all(lambda logger: logger.close())

    def _all(self, send: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                send(logger)
            except Exception as error:  # days of training do not end for a curve
                del self._loggers[name]
                say(f"--loggers {name} failed and is left out from here on: {error}")


def _earlier(file: Path) -> dict[str, str]:
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in ids.items()}
    except (OSError, ValueError, AttributeError):  # a service then begins a run of its own
        return {}
