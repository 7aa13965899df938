# SPDX-License-Identifier: Apache-2.0
"""What a run needs, made from the flags and from the checkpoint of ``--resume``."""

import random
import signal
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from detr_fast.config import Config, UsageError
from detr_fast.criterion import SetCriterion, loss_weights
from detr_fast.data.batch import collate
from detr_fast.data.coco import build_coco
from detr_fast.data.shapes import ShapesDetection
from detr_fast.matcher import build_matcher
from detr_fast.models.backbone import load_backbone_weights
from detr_fast.models.checkpoint import load_weights, model_config_from_checkpoint
from detr_fast.models.detr import DETR, build_detr

# what two runs may choose differently for one and the same set of weights
_NOT_ARCHITECTURE = {"num_classes", "dropout", "aux_loss"}
# what the names and shapes of weights do not show
_UNSEEN = {"dilation", "nheads"}


def stored_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint answers: its architecture and the data it was trained on.

    Checkpoints of this package carry them, those of facebookresearch/detr have a Namespace, its
    published weights nothing: there the shapes of the tensors tell most of the architecture.
    """
    args = checkpoint.get("args") or {}
    args = args if isinstance(args, dict) else vars(args)
    flags: dict[str, Any] = {}
    if model := model_config_from_checkpoint(checkpoint):
        told = args or "model_config" in checkpoint
        silent = _NOT_ARCHITECTURE if told else _NOT_ARCHITECTURE | _UNSEEN
        flags = {name: value for name, value in asdict(model).items() if name not in silent}
    flags |= {name: args[name] for name in ("dataset_file", "coco_path") if args.get(name)}
    return flags


def build_device(config: Config) -> torch.device:
    """The device of ``--device``; also seeds all random numbers and settles float32 arithmetic."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {config.device}: {reason}; try --device cpu") from error
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    random.seed(config.seed)
    # float32 means float32: the published numbers were made without TF32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


def build_dataset(image_set: str, config: Config) -> Dataset:
    """The ``"train"`` or ``"val"`` images of ``--dataset_file``, with their augmentation."""
    if config.dataset_file == "shapes":
        return ShapesDetection(image_set, augment=image_set == "train")
    return build_coco(image_set, config.coco_path)


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    # Ctrl-C reaches the whole process group; a worker that died of it would break the last step
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_loader(
    dataset: Dataset, config: Config, device: torch.device, *, shuffle: bool
) -> DataLoader:
    """Batches of ``--batch_size`` images: shuffled and full, or all of them in order."""
    if shuffle and len(dataset) < config.batch_size:
        raise UsageError(
            f"--batch_size {config.batch_size}: there are only {len(dataset)} training images"
        )
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(
        dataset,
        batch_sampler=BatchSampler(order, config.batch_size, drop_last=shuffle),
        collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        persistent_workers=config.num_workers > 0,
        pin_memory=device.type == "cuda",
    )


def build_model(
    config: Config,
    checkpoint: dict[str, Any] | None,
    class_names: dict[int, str],
    num_classes: int,
) -> DETR:
    """The model, with the weights of the checkpoint or else of ``--backbone_weights``.

    Raises:
        UsageError: if the checkpoint was trained for other classes than the data set has.
    """
    model = build_detr(config.model_config(num_classes), train_backbone=config.lr_backbone > 0)
    if checkpoint is None:
        load_backbone_weights(model, config.backbone_weights)
        return model
    stored = model_config_from_checkpoint(checkpoint)
    if stored and stored.num_classes != num_classes:
        raise UsageError(
            f"{config.resume} was trained for {stored.num_classes} classes, the data set "
            f"{config.dataset_file} has {num_classes}: evaluate it on the data it was made for"
        )
    names = checkpoint.get("class_names", class_names)
    if names != class_names:
        label = next(k for k in {**names, **class_names} if names.get(k) != class_names.get(k))
        raise UsageError(
            f"{config.resume} calls class {label} {names.get(label)!r}, the data set "
            f"{config.dataset_file} calls it {class_names.get(label)!r}"
        )
    load_weights(model, checkpoint)
    return model


def build_criterion(config: Config, num_classes: int) -> SetCriterion:
    """DETR's losses with the weights of the flags."""
    weights = loss_weights(
        config.dec_layers,
        config.aux_loss,
        bbox_loss_coef=config.bbox_loss_coef,
        giou_loss_coef=config.giou_loss_coef,
    )
    return SetCriterion(
        num_classes,
        matcher=build_matcher(config),
        weight_dict=weights,
        eos_coef=config.eos_coef,
        losses=["labels", "boxes", "cardinality"],
    )
