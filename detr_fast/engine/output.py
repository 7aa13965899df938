# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its output folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_fast.config import UsageError
from detr_fast.engine.evaluate import Evaluation
from detr_fast.engine.log import JsonLog, read_log
from detr_fast.models.checkpoint import write_checkpoint
from detr_fast.models.checksum import with_digests
from detr_fast.reference.boxes import box_cxcywh_to_xyxy
from detr_fast.visualize import draw_detections, plot_training_curves


class OutputFolder:
    """The folder of ``--output_dir``; with an empty name nothing is written.

    ``log.txt`` (a JSON object per epoch), ``checkpoint.pth`` (the last one) and
    ``checkpoint_previous.pth`` (the one before), ``checkpoint_best.pth`` (the highest AP),
    ``checkpointNNNN.pth`` (milestones), ``eval/latest.pth`` and ``eval/NNN.pth`` (precision and
    recall), ``curves.png`` and ``detections.png``. Every file is complete at any time: it is
    written aside and then renamed, but for ``log.txt``, which grows by whole lines.

    Args:
        path (str): the folder; it is made.
        start_epoch (int): the first epoch of this run; what ``log.txt`` has of later ones goes.
        keep (int): how many of the last checkpoints are kept, at least 1.

    Raises:
        UsageError: if the folder holds a ``log.txt`` of something else.
    """

    def __init__(self, path: str, start_epoch: int = 0, keep: int = 1) -> None:
        self._keep = keep
        self.path = Path(path) if path else None
        if self.path:
            (self.path / "eval").mkdir(parents=True, exist_ok=True)
            for abandoned in self.path.glob(".checkpoint*.tmp"):  # of a run killed while it wrote
                abandoned.unlink()
            try:
                if (log := self.path / "log.txt").exists():
                    read_log(log)
            except ValueError as error:
                raise UsageError(
                    f"--output_dir {path} holds a log of something else ({error}): name another "
                    "folder"
                ) from error
            self._log = JsonLog(self.path / "log.txt", start_epoch=start_epoch)

    def write_log(self, record: dict[str, Any]) -> None:
        """Append one epoch to ``log.txt`` and draw the curves anew."""
        if self.path:
            self._log.append(record)
            plot_training_curves(self.path / "log.txt", self.path / "curves.png")

    def write_checkpoint(self, state: dict[str, Any], *names: str) -> None:
        """Write ``checkpoint.pth`` and its copies ``checkpoint<name>.pth``, with checksums."""
        if self.path:
            state = with_digests(state)
            for name in names:
                write_checkpoint(state, self.path / f"checkpoint{name}.pth")
            # last: from here on a resumed run takes the others for written
            write_checkpoint(state, self.path / "checkpoint.pth", self._keep)

    def write_evaluation(self, epoch: int, evaluation: Evaluation) -> None:
        """Write precision and recall to ``eval/latest.pth``; every 50 epochs keep ``NNN.pth``."""
        if self.path:
            for name in ("latest", f"{epoch:03}") if epoch % 50 == 0 else ("latest",):
                write_checkpoint(evaluation.result.eval, self.path / "eval" / f"{name}.pth")

    def draw(self, dataset: Dataset, evaluation: Evaluation) -> None:
        """Draw the detections of the first images, with the annotated boxes, in one picture."""
        if not self.path:
            return
        pictures, targets = annotated_pictures(dataset, list(evaluation.samples))
        draw_detections(
            pictures,
            list(evaluation.samples.values()),
            dataset.class_names,
            self.path / "detections.png",
            targets=targets,
        )


def annotated_pictures(
    dataset: Dataset, image_ids: Sequence[int]
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of a data set to draw on, with what is annotated there.

    Args:
        dataset (Dataset): without random transforms.
        image_ids (list[int]): of its images.

    Returns:
        tuple: images (uint8 Tensor[3, H, W]), and of each image a dict with labels (int64[T]) and
        boxes (Tensor[T, 4]), corners in pixels of the image.
    """
    pictures, targets = [], []
    for index in map(dataset.index_of, image_ids):
        picture, target = dataset.load_image(index), dataset[index][1]
        height, width = picture.shape[-2:]
        boxes = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height, width, height])
        pictures.append(picture)
        targets.append({"labels": target["labels"], "boxes": boxes})
    return pictures, targets
