# SPDX-License-Identifier: Apache-2.0
"""Whole training steps: normalisation, forward, match, losses, backward, clipping and AdamW.

Ours is the step of a :class:`detr_fast.engine.train.Run` with the flags that the name of the
contender tells: from uint8 images on the device.  ``reference`` is ``--backend reference``, which
stands for the original loop.  It and transformers' DETR get images that are normalised already, as
their loaders do that.  ``DETR's criterion`` is our step with the original's matcher and losses.

All have the same weights and the same batch.  They are compared without dropout: all losses of all
layers, and the clipped gradient; and timed with the model's own, 0.1 in the transformer of DETR-R50
and none in the small model.  A case's name states the batch: images, the size that they are padded
to, and how many pixels there are for one of an image.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import transformers_detr
from benchmarks.harness import Case, Contender, Missing, Setup, on_cpu
from benchmarks.original import missing_for_original, original_losses
from benchmarks.whole_model import (
    BF16,
    COMPILED,
    GRAPHS,
    OFF,
    REFERENCE,
    RESNET50,
    SMALL_R50,
    Sizes,
    agreement,
    config_of,
    problem,
    random_weights,
    training_contender,
)
from detr_fast.criterion import SetCriterion
from detr_fast.engine.train import Run

# relative errors of losses and gradient
FLOAT32, BFLOAT16 = agreement(1e-4, 1e-3), agreement(2e-2, 0.15)
# one image whose matching turns with the rounding, of 32, changes the gradient by a quarter
TINY_BFLOAT16 = agreement(2e-2, 0.4)
# with auxiliary losses transformers normalises the queries between decoder layers, too: nothing
# changes while that norm has its first weights, but for its own gradient, 0.5 % of all
THEIR_FLOAT32 = agreement(1e-4, 1e-2)
OURS, OURS_BF16 = "--amp off", "--amp bf16"
TRANSFORMERS, TRANSFORMERS_BF16 = "transformers", "transformers, sdpa, bf16"
ORIGINAL = "DETR's criterion"
TINY_FLOORS = {"300 queries": {ORIGINAL: 1.3}}
R50_FLOORS = {
    "reference": 1.2,
    TRANSFORMERS: 1.2,
    ("reference", OURS_BF16): 1.8,
    (TRANSFORMERS_BF16, OURS_BF16): 1.2,
    # what stands for the original is no straw man
    (TRANSFORMERS, "reference"): 0.91,
}
# name, images, their side, queries, targets of an image
TINY = [("default run", 32, 128, 16, 3), ("300 queries", 16, 128, 300, 20)]
# sizes of the images in turn, number of images, multiple of pixels that a batch is rounded up to
LANDSCAPES = [(640, 853), (672, 896), (608, 912), (640, 960), (704, 938), (656, 875)]
LARGEST = [(800, 1333), (800, 1199), (800, 1066)]
R50 = {
    "cpu": [([(640, 640), (512, 600)], 2, 1)],
    "cuda": [(LANDSCAPES, 16, 64), (LANDSCAPES, 2, 64), (LARGEST, 8, 64)],
}
# where nothing is timed, or the time means nothing
SMALL: Sizes = [(64, 64), (48, 60)]
QUICK_TINY = [("default run", 4, 64, 16, 3)]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the default run, and DETR-R50 at 64x64."""
    tiny = [
        Case(
            f"{name}: {images} images {side}x{side}, {queries}x{targets}",
            functools.partial(tiny_step, device, images, side, queries, targets),
            small=functools.partial(tiny_step, device, 4, 128, queries, targets),
            check=FLOAT32,
            floors=on_cpu(device, TINY_FLOORS.get(name)),
            count_ops=True,
            images=images,
            in_graph=False,
            all_threads=True,
        )
        for name, images, side, queries, targets in (QUICK_TINY if quick else TINY)
    ]
    batches = [(SMALL, 2, 1)] if quick else R50[device.type]
    flags = SMALL_R50 if quick else RESNET50
    return tiny + [r50_case(device, flags, *batch) for batch in batches]


def r50_case(
    device: torch.device, flags: dict[str, Any], sizes: Sizes, images: int, multiple: int
) -> Case:
    """DETR-R50 on a batch that is padded to its largest image, rounded up to the multiple."""
    chosen = [sizes[index % len(sizes)] for index in range(images)]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*chosen, strict=True))
    waste = images * height * width / sum(h * w for h, w in chosen)
    rule = f" (multiples of {multiple})" if multiple > 1 else ""
    return Case(
        f"R50: {images} images padded to {height}x{width}{rule}, {waste:.2f} times their pixels",
        functools.partial(r50_step, device, flags, chosen, multiple),
        small=functools.partial(r50_step, device, SMALL_R50, SMALL, 1),
        check=FLOAT32,
        floors=on_cpu(device, R50_FLOORS),
        images=images,
        in_graph=False,
        all_threads=True,
    )


def test_train_step(case, bench):
    bench(case)


class OriginalCriterion(nn.Module):
    """The original DETR's matcher and losses in the place of :class:`SetCriterion`."""

    def __init__(self, ours: SetCriterion, listed: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.weight_dict, self.listed = ours.weight_dict, listed
        self.register_buffer("class_weight", ours.empty_weight)

    def forward(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        layers = [*outputs["aux_outputs"], outputs]
        return original_losses(layers, self.listed, self.class_weight)


def tiny_step(device: torch.device, images: int, side: int, queries: int, targets: int) -> Setup:
    """The small model of the default run; batches without padding."""
    flags = {"num_queries": queries}
    weights = random_weights(flags)
    given = problem(device, [(side, side)] * images, 1, targets, still=True)
    contender = functools.partial(training_contender, device, weights=weights, given=given)

    def with_original(run: Run) -> None:
        run.step.criterion = OriginalCriterion(run.step.criterion, given.listed).to(device)

    original = missing_for_original() or contender(flags | OFF, change=with_original)
    contenders = {
        OURS: contender(flags | OFF),
        OURS_BF16: contender(flags | BF16, check=TINY_BFLOAT16),
        "reference": contender(flags | REFERENCE),
        ORIGINAL: original,
    }
    return Setup(contenders["reference"].checked, contenders)


def r50_step(device: torch.device, flags: dict[str, Any], sizes: Sizes, multiple: int) -> Setup:
    """DETR-R50."""
    weights = random_weights(flags)
    given = problem(device, sizes, multiple, 7)
    ours = functools.partial(training_contender, device, weights=weights, given=given)
    theirs = functools.partial(
        transformers_detr.training_contender, device, config_of(flags), weights, given
    )
    in_bf16 = {"attention": "sdpa", "bf16": True, "check": BFLOAT16}
    contenders: dict[str, Contender | Missing] = {
        OURS: ours(flags | OFF),
        OURS_BF16: ours(flags | BF16, check=BFLOAT16),
        "reference": ours(flags | REFERENCE),
        TRANSFORMERS: theirs(check=THEIR_FLOAT32),
        TRANSFORMERS_BF16: theirs(**in_bf16),
    }
    if device.type == "cuda":
        contenders |= {
            f"{OURS_BF16} --compile on": ours(flags | COMPILED, check=BFLOAT16),
            f"{OURS_BF16} --compile on --cuda_graphs on": ours(flags | GRAPHS, check=BFLOAT16),
            f"{TRANSFORMERS_BF16}, compile": theirs(**in_bf16, slow_start=True),
        }
    return Setup(contenders["reference"].checked, contenders)
