# SPDX-License-Identifier: Apache-2.0
"""Evaluation: losses, detections and COCO AP over a data set."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from detr_fast.config import Config
from detr_fast.criterion import SetCriterion, weighted_losses
from detr_fast.data.annotations import DatasetError
from detr_fast.data.batch import ImageBatch
from detr_fast.engine.backend import Execution, chosen_ops
from detr_fast.engine.batch import DeviceBatches
from detr_fast.engine.build import (
    build_criterion,
    build_device,
    build_loader,
    build_model,
    evaluated_weights,
)
from detr_fast.engine.datasets import build_datasets, say_unusable_images
from detr_fast.engine.log import MetricLogger, SmoothedValue, say
from detr_fast.engine.metrics import TrainingDivergedError, listed, not_finite
from detr_fast.engine.precision import Precision
from detr_fast.engine.step import InferenceStep
from detr_fast.evaluation.coco import CocoEvaluator, CocoResult
from detr_fast.models.checkpoint import load_weights, write_checkpoint
from detr_fast.models.postprocess import PostProcess


class Evaluation(NamedTuple):
    """What an evaluation found: averaged metrics, COCO AP, and some detections to draw."""

    metrics: dict[str, float]
    result: CocoResult
    samples: dict[int, dict[str, Tensor]]  # image id -> detections, of the first images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion,
    batches: DeviceBatches,
    *,
    infer: Callable[[ImageBatch], dict[str, Any]] | None = None,
    evaluator: str = "hotcoco",
    print_freq: int = 10,
    keep: int = 12,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run the model over all batches and score its detections.

    Args:
        model (nn.Module): DETR.
        criterion (SetCriterion): for the losses in the log.
        batches (DeviceBatches): of a data set with ``ground_truth`` and ``category_ids``. A batch
            without a usable image is None.
        infer (Callable, optional): images to outputs; default: the model in the precision of its
            weights.
        evaluator (str): ``"hotcoco"`` or ``"pycocotools"``.
        print_freq (int): batches between two lines of the log.
        keep (int): how many images' detections to return.
        stopped (Callable): asked before every batch whether to end without a result.

    Returns:
        Evaluation | None: None if it was stopped.

    Raises:
        DatasetError: if not one image can be used.
        TrainingDivergedError: if losses are not finite; names terms and images.
    """
    model.eval()
    criterion.eval()
    log = MetricLogger(delimiter="  ")
    log.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    device, dataset = batches.device, batches.loader.dataset
    infer = infer or InferenceStep(model, Precision(device))
    scores = CocoEvaluator(dataset.ground_truth, evaluator, dataset.category_ids)
    postprocess = PostProcess()
    samples: dict[int, dict[str, Tensor]] = {}
    for batch in log.log_every(batches, print_freq, "Test:"):
        if stopped():
            return None
        if batch is None:
            continue
        outputs = infer(batch.images)
        losses = criterion(outputs, batch.targets)
        total, terms = weighted_losses(losses, criterion.weight_dict)
        if not total.isfinite():
            values = {name: value.item() for name, value in {"loss": total, **terms}.items()}
            raise TrainingDivergedError(
                f"the losses of the evaluation are not finite ({listed(not_finite(values))}; "
                f"images {batch.image_ids}): lower --lr, or go on from an earlier checkpoint"
            )
        log.update(class_error=losses["class_error"], loss=total, **terms)
        sizes = torch.stack([target["orig_size"] for target in batch.annotations])
        detections = postprocess(outputs, sizes.to(device))
        found = dict(zip(batch.image_ids, detections, strict=True))
        for image_id in list(found)[: keep - len(samples)]:
            samples[image_id] = {k: v.cpu() for k, v in found[image_id].items()}
        scores.update(found)
    if stopped():
        return None
    if not log.meters["loss"].count:
        raise DatasetError("no image to evaluate can be used: see the warnings above")
    log.say(f"Averaged stats: {log}")
    result = scores.summarize()
    log.say(result.table())
    return Evaluation(log.averages(), result, samples)


def per_class_lines(result: CocoResult, train_set: Dataset | None = None) -> Iterator[str]:
    """A table of AP and AP50, a line per class.

    Args:
        result (CocoResult): of an evaluation.
        train_set (Dataset, optional): adds the number of its boxes; the rarest class comes last.
    """
    scores = result.per_class()
    counts: dict[str, int] = {}
    if train_set is not None:
        boxes = train_set.box_counts()
        counts = {name: boxes.get(label, 0) for label, name in train_set.class_names.items()}
        scores = dict(sorted(scores.items(), key=lambda entry: -counts.get(entry[0], 0)))
    width = max(map(len, scores), default=0)
    yield f"{'':{width}}     AP   AP50" + ("  boxes in training" if counts else "")
    for name, score in scores.items():
        boxes = f"  {counts.get(name, 0)}" if counts else ""
        yield f"{name:>{width}}  {score['AP']:5.3f}  {score['AP50']:5.3f}{boxes}"


class Evaluated(NamedTuple):
    """A model from a checkpoint with the data that it is to be evaluated on."""

    model: nn.Module
    criterion: SetCriterion
    batches: DeviceBatches
    infer: InferenceStep

    @classmethod
    def of(cls, config: Config, checkpoint: dict[str, Any]) -> "Evaluated":
        """What the flags and the content of the file of ``--resume`` ask for."""
        device = build_device(config)
        execution = Execution.of(config, device)
        [dataset] = build_datasets(config, ("val",), checkpoint)
        model = build_model(config, dataset.num_classes)
        load_weights(model, evaluated_weights(checkpoint))
        model.to(device)
        criterion = build_criterion(config, dataset.num_classes).to(device)
        loader = build_loader(dataset, config, device, shuffle=False)
        batches = DeviceBatches(loader, criterion, device)
        return cls(model, criterion, batches, execution.inference(model))

    def score(self, config: Config) -> Evaluation:
        """Evaluate as the flags say, and say which images could not be used."""
        with chosen_ops(config):
            evaluation = evaluate(
                self.model,
                self.criterion,
                self.batches,
                infer=self.infer,
                evaluator=config.evaluator,
                print_freq=config.print_freq,
            )
        say_unusable_images(self.batches.loader.dataset)
        return evaluation


def evaluate_checkpoint(config: Config, checkpoint: dict[str, Any]) -> Evaluation:
    """Evaluate as the flags say; write ``eval.pth`` and ``detections.json`` where they ask for it.

    Args:
        config (Config): the flags.
        checkpoint (dict): the content of the file of ``--resume``.
    """
    evaluation = Evaluated.of(config, checkpoint).score(config)
    if config.per_class:
        say("\n".join(per_class_lines(evaluation.result)))
    if config.output_dir:
        output = Path(config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        write_checkpoint(evaluation.result.eval, output / "eval.pth")
        if config.save_json:
            (output / "detections.json").write_text(json.dumps(evaluation.result.detections))
    return evaluation
