# SPDX-License-Identifier: Apache-2.0
"""A trained model that takes images as people have them."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_fast.config import Config, UsageError
from detr_fast.data.batch import pad_images
from detr_fast.data.images import UnusableImage
from detr_fast.data.shapes import SIDE
from detr_fast.data.transforms import eval_transforms
from detr_fast.engine.backend import Execution
from detr_fast.engine.build import class_names_of, evaluated_weights, find_device
from detr_fast.engine.compiled import compiler_of
from detr_fast.engine.graphs import recorder_of
from detr_fast.engine.precision import Precision
from detr_fast.models.checkpoint import (
    CheckpointError,
    load_weights,
    model_config_from_checkpoint,
    read_checkpoint,
)
from detr_fast.models.detr import DETR, MODELS, PUBLISHED, PUBLISHED_FILES, build_detr
from detr_fast.models.postprocess import PostProcess
from detr_fast.predict.attention import AttentionMaps
from detr_fast.predict.detections import Detections
from detr_fast.predict.sources import Source, find_sources, is_one, read

READ_AHEAD = 2  # batches that threads have ready


class Prediction(NamedTuple):
    """One image and what was found in it."""

    source: Source
    image: Tensor  # uint8 (3, H, W), upright RGB
    detections: Detections


class Detector:
    """A model with all that turns images into named boxes.

    Args:
        model (DETR): in evaluation mode, on its device.
        class_names (dict[int, str]): label -> name.
        image_size (int): short side in pixels to which images are resized, the long one at most
            1333 / 800 of that: as the model was evaluated.
        category_ids (dict[int, int], optional): label -> category id of its data set.
        execution (Execution, optional): precision, compilation and CUDA graphs; default: eager, in
            float32.
    """

    def __init__(
        self,
        model: DETR,
        class_names: Mapping[int, str],
        *,
        image_size: int = 800,
        category_ids: Mapping[int, int] | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.model, self.class_names = model.eval(), dict(class_names)
        self.category_ids = None if category_ids is None else dict(category_ids)
        self.image_size = image_size
        self.device = next(model.parameters()).device
        execution = execution or _execution(Config(eval=True), self.device)
        self._config = execution.config
        self._infer = execution.inference(model)
        self._postprocess = PostProcess()
        self._resize = eval_transforms(image_size, "uint8")
        # imports torchvision: threads that do so side by side may find half of it
        self._resized(torch.zeros(3, 2, 2, dtype=torch.uint8))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        device: str = "auto",
        amp: str = "auto",
        image_size: int | None = None,
        compile: str = "off",
        cuda_graphs: str = "off",
        dilation: bool | None = None,
    ) -> Detector:
        """Read a checkpoint of this package or of facebookresearch/detr.

        Args:
            checkpoint (str | PathLike): a file, an ``https://`` address, or the name of a published
                model (``"detr_resnet50"``), whose weights are fetched.
            device (str): ``"auto"`` (CUDA if there is one), ``"cpu"``, ``"cuda:1"``, ...
            amp (str): precision of products: ``"auto"`` and ``"off"`` (float32), ``"bf16"``,
                ``"fp16"``.
            image_size (int, optional): short side in pixels; default: that of the training.
            compile (str): ``torch.compile``: ``"on"`` or ``"off"``.
            cuda_graphs (str): ``"on"`` replays shapes that return, for the least latency.
            dilation (bool, optional): needed of a DC5 file that does not say that it is one.

        Raises:
            CheckpointError: if it is no checkpoint, or not a safe one.
            UsageError: if the device cannot do what is asked for.
        """
        name = os.fspath(checkpoint)
        if name in PUBLISHED_FILES:
            content = read_checkpoint(PUBLISHED + PUBLISHED_FILES[name])
            config = replace(MODELS[name])
        else:
            content = read_checkpoint(name)
            config = model_config_from_checkpoint(content)
            if config is None:
                raise CheckpointError(
                    f"{name}: neither its entries nor its shapes tell the model: name a checkpoint "
                    "of tools/train.py or of facebookresearch/detr"
                )
        if dilation is not None:
            config = replace(config, dilation=dilation)
        flags = Config(device=device, amp=amp, compile=compile, cuda_graphs=cuda_graphs, eval=True)
        found = find_device(device)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            model = build_detr(config, folded=True)
        load_weights(model, evaluated_weights(content))
        return cls(
            model.to(found),
            class_names_of(content) or {},
            image_size=image_size or _image_size_of(content),
            category_ids=content.get("category_ids"),
            execution=_execution(flags, found),
        )

    def predict(
        self,
        images: Any,
        threshold: float = 0.5,
        *,
        batch_size: int = 1,
        attention: bool = False,
    ) -> Detections | list[Detections]:
        """Find objects.

        Args:
            images: see `detr_fast.predict.sources.find_sources`.
            threshold (float): the least score, in [0, 1].
            batch_size (int): images of a forward pass. Images of different sizes in one batch are
                padded, which moves scores a little, as in every DETR.
            attention (bool): also return where each object's query looked.

        Returns:
            Detections | list[Detections]: one for one image; else a list, without those that
            cannot be used: a warning names each of them.

        Raises:
            UnusableImage: if the one image cannot be used.
            UsageError, TypeError, ValueError: if there is no image, or not of a known kind.
        """
        alone = is_one(images)

        def leave_out(source: Source, why: UnusableImage) -> None:
            message = f"{source.name} {why}"
            if alone:
                raise UnusableImage(why.kind, message)
            warnings.warn(f"{message}; it is left out", stacklevel=3)

        sources = find_sources(images)
        found = [
            prediction.detections
            for prediction in self.stream(
                sources, threshold, batch_size=batch_size, attention=attention, unusable=leave_out
            )
        ]
        return found[0] if alone else found

    def stream(
        self,
        sources: Iterable[Source],
        threshold: float = 0.5,
        *,
        batch_size: int = 1,
        workers: int = 2,
        attention: bool = False,
        unusable: Callable[[Source, UnusableImage], None] = lambda source, why: None,
    ) -> Iterator[Prediction]:
        """Find objects in image after image, of which few are in memory at a time.

        Args:
            sources (Iterable[Source]): of `detr_fast.predict.sources.find_sources`.
            threshold (float), batch_size (int), attention (bool): see `predict`.
            workers (int): threads that read and resize ahead.
            unusable (Callable): told of each image that cannot be used, and why.
        """
        if not 0 <= threshold <= 1:
            raise UsageError(f"threshold {threshold}: a score lies in [0, 1]")
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size}: expected at least 1")
        if attention and "on" in (self._config.compile, self._config.cuda_graphs):
            raise UsageError("attention maps need a model that is not compiled, and no CUDA graphs")
        waiting: list[tuple[Source, Tensor, Tensor]] = []
        for source, image, resized in self._read_ahead(sources, batch_size, workers, unusable):
            waiting.append((source, image, resized))
            if len(waiting) == batch_size:
                yield from self._predict(waiting, threshold, attention)
                waiting = []
        if waiting:
            yield from self._predict(waiting, threshold, attention)

    def _read_ahead(
        self,
        sources: Iterable[Source],
        batch_size: int,
        workers: int,
        unusable: Callable[[Source, UnusableImage], None],
    ) -> Iterator[tuple[Source, Tensor, Tensor]]:
        def prepare(source: Source) -> tuple[Tensor, Tensor] | UnusableImage:
            image = read(source)
            return image if isinstance(image, UnusableImage) else (image, self._resized(image))

        remaining = iter(sources)
        ahead: deque[tuple[Source, Future[Any]]] = deque()
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            try:
                while True:
                    for source in islice(remaining, READ_AHEAD * batch_size - len(ahead) + 1):
                        ahead.append((source, pool.submit(prepare, source)))
                    if not ahead:
                        return
                    source, future = ahead.popleft()
                    outcome = future.result()
                    if isinstance(outcome, UnusableImage):
                        unusable(source, outcome)
                    else:
                        yield source, *outcome
            finally:
                pool.shutdown(cancel_futures=True)

    def _resized(self, image: Tensor) -> Tensor:
        nothing = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "area": torch.zeros(0),
            "iscrowd": torch.zeros(0, dtype=torch.int64),
        }
        return self._resize(image, nothing)[0]

    @torch.no_grad()
    def _predict(
        self, images: list[tuple[Source, Tensor, Tensor]], threshold: float, attention: bool
    ) -> Iterator[Prediction]:
        batch = pad_images([resized for _, _, resized in images]).to(self.device)
        maps = AttentionMaps(self.model)
        with maps.watching() if attention else nullcontext():
            outputs = self._infer(batch)
        sizes = torch.tensor([tuple(image.shape[-2:]) for _, image, _ in images])
        results = self._postprocess(outputs, sizes.to(self.device))
        for place, ((source, image, _), result) in enumerate(zip(images, results, strict=True)):
            order = result["scores"].argsort(descending=True, stable=True)
            kept = order[result["scores"][order] >= threshold]
            labels = result["labels"][kept].cpu().numpy()
            names = [self.class_names.get(int(n), f"class {n}") for n in labels]
            data = {"class_name": np.array(names, dtype=str)}
            if attention:
                data["attention"] = maps.of(place, kept).cpu().numpy()
            found = Detections(
                xyxy=result["boxes"][kept].cpu().numpy(),
                confidence=result["scores"][kept].cpu().numpy(),
                class_id=labels,
                data=data,
                size=(image.shape[-2], image.shape[-1]),
                source=source.name,
            )
            yield Prediction(source, image, found)


def _execution(config: Config, device: torch.device) -> Execution:
    precision = Precision.of(config, device, training=False)
    compiler, recorder = compiler_of(config, device), recorder_of(config, device)
    return Execution(config, device, precision, precision, compiler, recorder)


def _image_size_of(checkpoint: Mapping[str, Any]) -> int:
    """The short side that a checkpoint was evaluated with."""
    args = checkpoint.get("args")
    if not isinstance(args, dict):  # of the original, whose size is fixed
        return Config().image_size
    if args.get("dataset_file") == "shapes":
        return SIDE
    size = args.get("image_size", Config().image_size)
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"the checkpoint's image_size is {size!r}: expected pixels")
    return size
