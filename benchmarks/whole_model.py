# SPDX-License-Identifier: Apache-2.0
"""Whole trainings for the benchmarks: built from flags, as the command line builds them."""

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Check, Contender
from benchmarks.memory import graph_bytes, training_bytes
from detr_fast.config import Config, configure
from detr_fast.data.batch import ImageBatch
from detr_fast.engine.backend import chosen_ops
from detr_fast.engine.batch import Batch, model_input
from detr_fast.engine.host_memory import KEPT, keep_freed_memory
from detr_fast.engine.optim import training_mode
from detr_fast.engine.train import Run
from detr_fast.matcher.packing import Targets

CLASSES = 4  # of the generated data, whose labels a run without a data set has
UNSCALED = "_unscaled"
# what glibc keeps by itself once it has seen the largest blocks that it reuses (mallopt(3))
KEPT_BY_GLIBC = 64 << 20
Sizes = list[tuple[int, int]]
Weights = dict[str, Tensor]

# eager steps in float32 and bfloat16, and what a GPU adds to them
EAGER = {"compile": "off", "cuda_graphs": "off"}
OFF, BF16 = EAGER | {"amp": "off"}, EAGER | {"amp": "bf16"}
COMPILED, GRAPHED = BF16 | {"compile": "on"}, BF16 | {"cuda_graphs": "on"}
GRAPHS = COMPILED | {"cuda_graphs": "on"}
REFERENCE = {"backend": "reference"}
RESNET50 = {"model": "detr_resnet50", "backbone_weights": "none", "dropout": 0.1}
# where nothing is timed, or the time means nothing
SMALL_R50 = RESNET50 | {"enc_layers": 1, "dec_layers": 2}
# every step computes and writes an update, and leaves the weights where they are
STILL = {"lr": 1e-30, "lr_backbone": 1e-30, "weight_decay": 0.0}
STEPS_TO_CAPTURE = 8  # a graph may be captured when a shape has returned a few times


class Problem(NamedTuple):
    """A batch in the forms that the contenders take."""

    bytes: Batch  # uint8 images, as a fast run gets them from its loader
    floats: Batch  # the same, normalised: as the original's loader hands them over
    listed: list[dict[str, Tensor]]  # targets of each image

    @property
    def padding(self) -> float:
        """Pixels of the batch over those of its images."""
        tensors, sizes = self.floats.images
        real = tensors[:, 0].numel() if sizes is None else int(sizes.prod(1).sum())
        return tensors[:, 0].numel() / real


def problem(
    device: torch.device, sizes: Sizes, multiple: int, boxes: int, *, still: bool = False
) -> Problem:
    """Random images with about `boxes` targets each.

    Args:
        device (torch.device): where the batch goes.
        sizes (list[tuple[int, int]]): height and width of each image.
        multiple (int): of pixels, to which the height and width of the batch are rounded up.
        boxes (int): targets of an image: one or two fewer or more.
        still (bool): all images have `boxes` targets.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    pixels = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    for image, (h, w) in zip(pixels, sizes, strict=True):
        image[:, :h, :w] = torch.randint(256, (3, h, w), generator=generator, dtype=torch.uint8)
    padded = any(size != (height, width) for size in sizes)
    images = ImageBatch(pixels, torch.tensor(sizes, dtype=torch.int32) if padded else None)
    counts = [boxes if still else max(1, boxes - 2 + index % 5) for index in range(len(sizes))]
    listed = [
        {
            "labels": torch.randint(CLASSES, (n,), generator=generator),
            "boxes": 0.2 + 0.6 * torch.rand(n, 4, generator=generator),
        }
        for n in counts
    ]
    images, packed = images.to(device), Targets.from_list(listed).to(device)
    floats = model_input(images, torch.float32)
    floats = floats._replace(tensors=floats.tensors.contiguous())
    names = [{"image_id": index} for index in range(len(sizes))]
    listed = [{name: value.to(device) for name, value in of.items()} for of in listed]
    return Problem(Batch(images, packed, names), Batch(floats, packed, names), listed)


def build_run(device: torch.device, flags: dict[str, Any], weights: Weights | None = None) -> Run:
    """A training as the command line builds it, writing nothing, with the given weights."""
    of_all = {"dataset_file": "shapes", "output_dir": "", "num_workers": 0, "device": str(device)}
    with contextlib.redirect_stdout(io.StringIO()):  # the tables are all there is to say
        run = Run(configure(of_all | STILL | flags), None)
    if weights is not None:
        run.model.load_state_dict(weights)
    return run


def random_weights(flags: dict[str, Any]) -> Weights:
    """Weights whose frozen norms matter, with scales under which activations stay small."""
    run = build_run(torch.device("cpu"), flags | REFERENCE)
    generator = torch.Generator().manual_seed(0)
    if run.config.backbone != "tiny":
        for name, buffer in run.model.backbone.named_buffers():
            if name.endswith(("weight", "running_var")):
                buffer.copy_(0.3 + 0.5 * torch.rand(buffer.shape, generator=generator))
            elif name.endswith(("bias", "running_mean")):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def train(run: Run, given: Problem) -> dict[str, Tensor]:
    """One step of a run."""
    batch = given.floats if run.config.backend == "reference" else given.bytes
    with chosen_ops(run.config):
        return run.step(batch, 0, 1)


def losses_and_gradients(run: Run, given: Problem) -> tuple[dict[str, Tensor], Weights]:
    """What a step finds: all losses without their weights, and the clipped gradient."""
    run.step.criterion.train()
    training_mode(run.model)
    for _ in range(STEPS_TO_CAPTURE if run.config.cuda_graphs == "on" else 1):
        values = train(run, given)
    losses = {n.removesuffix(UNSCALED): v.float() for n, v in values.items() if UNSCALED in n}
    gradients = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    return losses, {name: gradient.float().clone() for name, gradient in gradients.items()}


def agreement(loss: float, gradient: float) -> Check:
    """Losses agree one by one, relatively; the gradient as one vector, by norm.

    The errors that count, of class and cardinality, jump where two logits are close.
    """

    def check(actual: Any, expected: Any) -> None:
        (losses, gradients), (of_losses, of_gradients) = actual, expected
        shared = sorted(n for n in losses.keys() & of_losses.keys() if n.startswith("loss_"))
        assert {"loss_ce", "loss_bbox", "loss_giou"} <= set(shared), f"only {shared}"
        for name in shared:
            found, right = losses[name].item(), of_losses[name].item()
            assert abs(found - right) <= loss * abs(right) + 1e-5, f"{name}: {found}, not {right}"
        assert gradients.keys() == of_gradients.keys(), "gradients of other parameters"
        pairs = [(gradients[name], g) for name, g in of_gradients.items()]
        error = torch.stack([(a.to(e) - e).norm() for a, e in pairs]).norm()
        error = (error / torch.stack([e.norm() for _, e in pairs]).norm()).item()
        assert error <= gradient, f"relative error of the gradient {error:.1e} > {gradient:.1e}"

    return check


def training_contender(
    device: torch.device,
    flags: dict[str, Any],
    weights: Weights,
    given: Problem,
    *,
    check: Check | None = None,
    change: Callable[[Run], None] = lambda run: None,
) -> Contender:
    """A run as a contender: timed with the dropout of the flags, compared without any.

    Args:
        device (torch.device): where it trains.
        flags (dict): of the command line.
        weights (dict[str, Tensor]): of the model.
        given (Problem): the batch.
        check (Callable, optional): in place of the case's.
        change (Callable): is given each run before its first step.
    """

    def fresh(flags: dict[str, Any]) -> Run:
        run = build_run(device, flags, weights)
        training_mode(run.model)
        change(run)
        return run

    run = fresh(flags)

    def held() -> int:
        return training_bytes(run.model, run.learner.optimizer) + graph_bytes()

    return Contender(
        lambda: train(run, given),
        checked=lambda: losses_and_gradients(fresh(flags | {"dropout": 0.0}), given),
        check=check,
        slow_start=flags.get("compile") == "on",
        before=memory_of(device, fast=run.config.backend == "fast"),
        held=held,
    )


def memory_of(device: torch.device, *, fast: bool) -> Callable[[], Any] | None:
    """What sets how freed memory is kept: by us in our runs, else by glibc as it does alone.

    That holds for a process, and without this the peers would have the gain of ours.
    """
    if device.type != "cpu":
        return None
    return functools.partial(keep_freed_memory, kept=KEPT if fast else KEPT_BY_GLIBC)


def config_of(flags: dict[str, Any]) -> Config:
    """The flags of a run with all their defaults."""
    return configure({"dataset_file": "shapes"} | flags)
