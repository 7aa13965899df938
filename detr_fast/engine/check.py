# SPDX-License-Identifier: Apache-2.0
"""``--check_data``: look at every annotation and image before a training does."""

from detr_fast.config import Config, UsageError
from detr_fast.data.annotations import DatasetError
from detr_fast.data.coco import CocoDetection
from detr_fast.data.validate import DataReport, check_images
from detr_fast.engine.datasets import read_datasets
from detr_fast.engine.log import MetricLogger, say


def check_data(config: Config) -> None:
    """Read all annotations, decode all images, and say what is wrong with them.

    Raises:
        DatasetError: if anything is wrong.
        UsageError: if the data are generated.
    """
    if config.dataset_file == "shapes":
        raise UsageError("--check_data: generated images have nothing to check: name your data")
    splits = ("val",) if config.eval else ("train", "val")
    wrong = 0
    datasets = read_datasets(config, splits)
    for split, (dataset, of_annotations) in zip(splits, datasets, strict=True):
        of_images = _check_images(split, dataset)
        wrong += len(of_annotations) + len(of_images)
        _say_classes(split, dataset)
    if wrong:
        raise DatasetError(f"{wrong} problems in the data, said above; training leaves them out")
    say("nothing wrong found")


def _check_images(split: str, dataset: CocoDetection) -> DataReport:
    report = DataReport(str(dataset.image_folder))
    checked = check_images(dataset, report)
    for _ in MetricLogger().log_every(range(len(dataset)), 1000, f"Images ({split}):"):
        next(checked)
    for line in report.lines():
        say(f"warning: {line}")
    return report


def _say_classes(split: str, dataset: CocoDetection) -> None:
    counts = dataset.box_counts()
    total = max(sum(counts.values()), 1)
    width = max(map(len, dataset.class_names.values()))
    say(f"{'class':>{width}}  label  category id  boxes ({split})")
    for label, name in sorted(dataset.class_names.items(), key=lambda e: -counts.get(e[0], 0)):
        count = counts.get(label, 0)
        category = dataset.category_ids.get(label, "-")
        say(f"{name:>{width}}  {label:5}  {category:>11}  {count} ({count / total:.1%})")
