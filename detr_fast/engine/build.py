# SPDX-License-Identifier: Apache-2.0
"""What a run needs, made from the flags and from the checkpoint of ``--resume``."""

import signal
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from detr_fast.config import Config, Stored, UsageError
from detr_fast.criterion import SetCriterion, loss_weights
from detr_fast.data.batch import collate
from detr_fast.data.coco import CocoDetection
from detr_fast.data.labels import COCO_CATEGORIES, COCO_NUM_CLASSES
from detr_fast.data.packed import PackedCollate
from detr_fast.data.sampler import BucketedBatches, ShuffledBatches
from detr_fast.data.validate import one_line
from detr_fast.engine.log import say
from detr_fast.engine.random_state import seed_everything
from detr_fast.matcher import build_matcher
from detr_fast.models.backbone import load_backbone_weights
from detr_fast.models.checkpoint import load_weights, model_config_from_checkpoint
from detr_fast.models.detr import DETR, build_detr
from detr_fast.models.finetune import load_fitting_weights

GRACE = 30  # seconds that a worker lives on after SIGTERM
# what two runs may choose differently for one and the same set of weights
_NOT_ARCHITECTURE = {"num_classes", "dropout", "aux_loss"}
# what the names and shapes of weights do not show
_UNSEEN = {"dilation", "nheads"}


# of the original's Namespace; more of it belongs to its call
_OF_THE_ORIGINAL = ("dataset_file", "coco_path", "lr", "lr_backbone", "weight_decay", "lr_drop")


def stored_flags(checkpoint: dict[str, Any]) -> Stored:
    """The flags that a checkpoint answers: its architecture, and the run that wrote it.

    Checkpoints of this package carry them, those of facebookresearch/detr have a Namespace, its
    published weights nothing: there the shapes of the tensors tell most of the architecture.
    """
    args = checkpoint.get("args") or {}
    if isinstance(args, Namespace):
        args = {name: value for name, value in vars(args).items() if name in _OF_THE_ORIGINAL}
        args = {name: value for name, value in args.items() if value is not None}
    architecture: dict[str, Any] = {}
    if model := model_config_from_checkpoint(checkpoint):
        told = checkpoint.get("args") or "model_config" in checkpoint
        silent = _NOT_ARCHITECTURE if told else _NOT_ARCHITECTURE | _UNSEEN
        architecture = {name: v for name, v in asdict(model).items() if name not in silent}
    return Stored(architecture, {n: v for n, v in args.items() if n not in architecture})


def evaluated_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights that count: the moving average (``--ema_decay``) where there is one."""
    return {"model": checkpoint["ema"]} if "ema" in checkpoint else checkpoint


def build_device(config: Config) -> torch.device:
    """The device of ``--device``; also seeds all random numbers and settles float32 arithmetic."""
    device = find_device(config.device)
    seed_everything(config.seed, deterministic=config.deterministic)
    return device


def find_device(name: str) -> torch.device:
    """The device of this name, which must be there; ``auto``: CUDA if there is one.

    Raises:
        UsageError: if there is no such device.
    """
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {asked}: {reason}; try --device cpu") from error
    return device


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the workers, too; one that died of it would break the
    # last step. The main process ends its workers by SIGTERM if all else fails: hence the alarm.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def build_loader(
    dataset: Dataset, config: Config, device: torch.device, *, shuffle: bool
) -> DataLoader:
    """Batches of ``--batch_size`` images: shuffled and full, or all in order.

    Shuffled batches are those of ``--padding`` (`BucketedBatches`, `ShuffledBatches`).

    Raises:
        UsageError: if there are too few images for a full batch.
    """
    if shuffle and len(dataset) < config.batch_size:
        raise UsageError(
            f"--batch_size {config.batch_size}: there are only {len(dataset)} training images"
        )
    bucket = bucket_of(config, dataset) if shuffle else 0
    if bucket:
        batches = BucketedBatches(
            _image_sizes(dataset), config.batch_size, config.seed, config.image_size, bucket
        )
    elif shuffle:
        batches = ShuffledBatches(len(dataset), config.batch_size, config.seed)
    else:
        batches = BatchSampler(SequentialSampler(dataset), config.batch_size, drop_last=False)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=PackedCollate(partial(collate, multiple=bucket or None)),
        num_workers=config.num_workers,
        worker_init_fn=_leave_signals_to_the_main_process,
        persistent_workers=config.num_workers > 0,
        pin_memory=device.type == "cuda",
        # each pass draws a number; from the default generator it would shift what dropout draws
        generator=torch.Generator().manual_seed(config.seed),
    )


def bucket_of(config: Config, dataset: Dataset) -> int:
    """``--bucket``, where training batches are grouped by it.

    0 under ``--padding official``, and for generated images, which have one size.
    """
    return config.bucket if config.padding == "bucket" and hasattr(dataset, "image_sizes") else 0


def _image_sizes(dataset: CocoDetection) -> np.ndarray:
    if unknown := np.count_nonzero(dataset.unknown_sizes):
        say(
            f"{dataset.annotations.source}: gives no size for {unknown} images; their headers are "
            "read (--padding official needs no sizes)"
        )
    return dataset.image_sizes()


def begin_epoch(loader: DataLoader, epoch: int, batch: int) -> None:
    """Let the next pass over training batches be that of an epoch, and say what padding it has.

    Args:
        loader (DataLoader): of `build_loader`, shuffled.
        epoch (int): its number.
        batch (int): the first batch.
    """
    batches = loader.batch_sampler
    batches.begin(epoch, batch)
    if isinstance(batches, BucketedBatches):
        padding = batches.padding()
        say(
            f"Epoch: [{epoch}]  batches have {padding.shapes} shapes and {padding.waste:.2f} times "
            f"the pixels of their images ({padding.at_random:.2f} with --padding official)"
        )


def build_model(config: Config, num_classes: int) -> DETR:
    """The model of the flags with weights as they are at the start of a training from nothing."""
    return build_detr(
        config.model_config(num_classes),
        folded=config.backend == "fast",
        train_backbone=config.lr_backbone > 0,
    )


def load_starting_weights(
    model: DETR, config: Config, checkpoint: dict[str, Any] | None, names: dict[int, str]
) -> bool:
    """Bring the weights that a training starts from.

    Those of ``--resume`` or ``--finetune``, without what does not fit other classes or queries; or
    else of ``--backbone_weights``.

    Args:
        model (DETR): gets the weights.
        config (Config): the flags.
        checkpoint (dict, optional): the content of the file of ``--resume`` or ``--finetune``.
        names (dict[int, str]): class names of the data.

    Returns:
        bool: whether a run goes on from where the checkpoint stands.

    Raises:
        UsageError: if ``--resume`` names a run on data with other classes.
    """
    if checkpoint is None:
        load_backbone_weights(model, config.backbone_weights)
        return False
    earlier = class_names_of(checkpoint)
    stored = model_config_from_checkpoint(checkpoint)
    same_head = stored is None or stored.num_classes == model.config.num_classes
    state = checkpoint.keys() >= {"optimizer", "lr_scheduler", "epoch"}
    source = config.resume or config.finetune
    if config.resume and state:
        if not same_head or earlier not in (None, names):
            raise UsageError(
                f"{source} is a run on data with other classes than these: start from its weights "
                "with --finetune, into another --output_dir"
            )
        load_weights(model, checkpoint)
        return True
    for part in load_fitting_weights(model, evaluated_weights(checkpoint), names, earlier):
        say(f"{source}: {part}")
    say(f"{source}: all other weights are loaded; training starts with a new optimizer")
    return False


def class_names_of(checkpoint: dict[str, Any]) -> dict[int, str] | None:
    """Label -> name of a checkpoint; None where nothing tells the names.

    The original's checkpoints name no classes; with 91 of them they are taken for those of COCO.
    """
    if "class_names" in checkpoint:
        return {label: one_line(name) for label, name in checkpoint["class_names"].items()}
    model = model_config_from_checkpoint(checkpoint)
    return dict(COCO_CATEGORIES) if model and model.num_classes == COCO_NUM_CLASSES else None


def build_criterion(config: Config, num_classes: int) -> SetCriterion:
    """DETR's losses with the weights of the flags; NaN where a matching cost is not finite."""
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
        raise_non_finite=False,
    )
