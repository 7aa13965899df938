# SPDX-License-Identifier: Apache-2.0
"""The data sets of a run: found, read and checked, their classes mapped to labels."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from detr_fast.config import Config, UsageError
from detr_fast.data.annotations import CocoAnnotations, DatasetError, read_json
from detr_fast.data.coco import CocoDetection
from detr_fast.data.labels import LabelMap, distinct
from detr_fast.data.layouts import Source, find_layout
from detr_fast.data.shapes import ShapesDetection
from detr_fast.data.transforms import eval_transforms, train_transforms
from detr_fast.data.validate import DataReport, leave_out_missing_images
from detr_fast.engine.build import class_names_of
from detr_fast.engine.cache import cache_images
from detr_fast.engine.log import say
from detr_fast.models.checkpoint import CheckpointError, model_config_from_checkpoint
from detr_fast.models.model_config import ModelConfig

SHOWN = 10  # classes named in the line that counts them


def build_datasets(
    config: Config, splits: tuple[str, ...], checkpoint: dict[str, Any] | None = None
) -> list[Dataset]:
    """The data sets of a run, what is wrong with them said in a line per kind.

    Those of a training keep their images as ``--cache`` says.

    Args and errors are those of `read_datasets`; under ``--strict_data`` a DatasetError, too,
    if anything is wrong.
    """
    datasets = read_datasets(config, splits, checkpoint)
    wrong = sum(len(report) for _, report in datasets)
    if wrong and config.strict_data:
        raise DatasetError(
            f"{wrong} problems in the data, said above: mend them, or leave --strict_data out"
        )
    found = [dataset for dataset, _ in datasets]
    if not config.eval:  # which reads every image once
        cache_images(config, found)
    return found


def read_datasets(
    config: Config, splits: tuple[str, ...], checkpoint: dict[str, Any] | None = None
) -> list[tuple[Dataset, DataReport]]:
    """The data sets of ``--dataset_file``, all with one map from classes to labels.

    Args:
        config (Config): the flags.
        splits (tuple[str, ...]): of ``"train"`` (augmented) and ``"val"``.
        checkpoint (dict, optional): to be evaluated: its labels are taken, not those of the data.

    Returns:
        list[tuple[Dataset, DataReport]]: per split the data and what is wrong with them, which has
        been said.

    Raises:
        DatasetError: if there are no usable data.
        UsageError: if the checkpoint does not know the classes of the data.
    """
    # the fast path sends bytes and normalises them on the device
    pixels = "uint8" if config.backend == "fast" else "float32"
    if config.dataset_file == "shapes":
        shapes = [
            ShapesDetection(split, augment=split == "train", pixels=pixels) for split in splits
        ]
        if checkpoint is not None:
            names = ShapesDetection.class_names
            labels_of_checkpoint(config, checkpoint, names, set(names))
        return [(dataset, DataReport("shapes")) for dataset in shapes]
    sources = _sources(config, splits)
    reports = {split: DataReport(str(source.annotations)) for split, source in sources.items()}
    tables = {split: _read(source, reports[split]) for split, source in sources.items()}
    for note in dict.fromkeys(note for report in reports.values() for note in report.notes):
        say(note)
    first = tables[splits[0]]
    if checkpoint is None:
        labels = LabelMap.from_categories(first.class_names)
    else:
        used = set(first.labels.tolist())
        labels = labels_of_checkpoint(config, checkpoint, first.class_names, used)
    datasets = [
        CocoDetection(
            sources[split].images,
            tables[split],
            (train_transforms if split == "train" else eval_transforms)(config.image_size, pixels),
            labels=labels,
            unusable="raise" if config.strict_data else "replace" if split == "train" else "skip",
            report=reports[split],
        )
        for split in splits
    ]
    for split, dataset in zip(splits, datasets, strict=True):
        _describe(split, dataset, reports[split])
    return [(dataset, reports[split]) for split, dataset in zip(splits, datasets, strict=True)]


def _sources(config: Config, splits: tuple[str, ...]) -> dict[str, Source]:
    """Where the data are."""
    if config.coco_path:
        layout = find_layout(Path(config.coco_path), remove_difficult=config.remove_difficult)
        say(layout.said)
        return {split: layout.source(split) for split in splits}
    sources = {}
    for split in splits:
        images, annotations = (
            Path(getattr(config, f"{split}_{part}")) for part in ("images", "annotations")
        )
        sources[split] = Source(images, annotations, lambda _, path=annotations: read_json(path))
    return sources


def _read(source: Source, report: DataReport) -> CocoAnnotations:
    """The annotations of a split, without what is wrong with them."""
    if not source.images.is_dir():
        raise DatasetError(f"{source.images}: no such image folder: check the path")
    content = source.read(report)
    table = CocoAnnotations.from_dict(content, str(source.annotations), report)
    return leave_out_missing_images(table, source.images, report)


def _describe(split: str, dataset: CocoDetection, report: DataReport) -> None:
    """Say what there is and what is wrong with it."""
    counts = dict(sorted(dataset.box_counts().items(), key=lambda entry: -entry[1]))
    boxes = sum(counts.values())
    named = _listed([f"{dataset.class_names[label]} {counts[label]}" for label in counts])
    say(f"{split}: {len(dataset)} images, {boxes} boxes of {len(counts)} classes: {named}")
    for line in report.lines():
        say(f"warning: {line}")
    if not boxes:
        raise DatasetError(
            f"{report.source}: no box to learn or to score in {len(dataset)} images: check that "
            "'annotations' is not empty, that its image_id are ids of 'images', and that boxes are "
            "[x, y, width, height] in pixels"
        )


def say_unusable_images(*datasets: Dataset) -> None:
    """Sum up which images could not be used when they were opened."""
    for dataset in datasets:
        if isinstance(dataset, CocoDetection):
            for line in dataset.unusable_report().lines():
                say(f"warning: {line}")


def labels_of_checkpoint(
    config: Config, checkpoint: dict[str, Any], categories: dict[int, str], used: set[int]
) -> LabelMap:
    """The labels of a checkpoint to be evaluated on data with these categories.

    Classes are compared by name. Where the checkpoint names none, and the data are not of COCO, its
    labels are taken as category ids, as the original has it.

    Args:
        config (Config): the flags.
        checkpoint (dict): the content of the file of ``--resume``.
        categories (dict[int, str]): category id -> name of the data.
        used (set[int]): ids of those that have a box.

    Raises:
        UsageError: if the checkpoint does not know a class that has a box.
    """
    model = model_config_from_checkpoint(checkpoint)
    num_classes = model.num_classes if model else ModelConfig().num_classes
    names = class_names_of(checkpoint)
    if names is not None:
        try:
            labels = LabelMap.from_names(names, num_classes)
        except ValueError as error:
            raise CheckpointError(f"{config.resume}: its class_names: {error}") from error
        missing = used - labels.labels_of(categories).keys()
        if not missing:
            return labels
        if "class_names" in checkpoint:
            raise UsageError(
                f"{config.resume} knows {_listed(list(labels.names.values()))}; the data have "
                f"{_listed([categories[i] for i in sorted(missing)])}: evaluate it on the data it "
                "was made for, or train on these with --finetune"
            )
    if max(used, default=0) >= num_classes:
        raise UsageError(
            f"{config.resume} was trained for {num_classes} classes, the data have category ids "
            f"up to {max(used)}: evaluate it on the data it was made for"
        )
    say(f"warning: {config.resume} names no classes: its labels are taken as category ids")
    named = distinct(categories)
    return LabelMap({i: named[i] for i in named if i < num_classes}, num_classes)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
