# SPDX-License-Identifier: Apache-2.0
"""Inference of DETR-R50 at 800x1066: from uint8 images on the device to boxes in pixels.

Ours is :attr:`detr_fast.engine.train.Run.infer`, which evaluations call, with the flags that the
name of the contender tells, and :class:`PostProcess`.  ``reference`` is ``--backend reference``.
transformers' DETR gets images that plain torch normalises here; its processor makes the boxes,
at threshold 0.  All have the same weights and images; no image is padded.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import transformers_detr
from benchmarks.harness import Case, Check, Contender, Setup, on_cpu
from benchmarks.memory import bytes_of, graph_bytes
from benchmarks.whole_model import (
    BF16,
    COMPILED,
    GRAPHED,
    GRAPHS,
    OFF,
    REFERENCE,
    RESNET50,
    SMALL_R50,
    STEPS_TO_CAPTURE,
    Problem,
    Weights,
    build_run,
    config_of,
    memory_of,
    problem,
    random_weights,
)
from detr_fast.engine.backend import chosen_ops
from detr_fast.models import PostProcess

SIZE, SMALL_SIZE = (800, 1066), (64, 96)
BATCHES = {"cpu": (1, 2), "cuda": (1, 16)}
OURS, OURS_BF16 = "--amp off", "--amp bf16"
TRANSFORMERS, TRANSFORMERS_BF16 = "transformers", "transformers, sdpa, bf16"
FLOORS = {
    "reference": 1.2,
    TRANSFORMERS: 1.2,
    ("reference", OURS_BF16): 1.8,
    (TRANSFORMERS_BF16, OURS_BF16): 1.2,
}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` one image of 64x96."""
    size, flags = (SMALL_SIZE, SMALL_R50) if quick else (SIZE, RESNET50)
    return [
        Case(
            f"R50: {images} images {size[0]}x{size[1]}, not padded",
            functools.partial(inference, device, flags, [size] * images),
            small=functools.partial(inference, device, SMALL_R50, [SMALL_SIZE] * images),
            check=agreement(1e-4, 1e-2),
            floors=on_cpu(device, FLOORS),
            images=images,
            in_graph=False,
            all_threads=True,
        )
        for images in BATCHES[device.type][: 1 if quick else None]
    ]


def agreement(score: float, pixels: float) -> Check:
    """Scores, and boxes in pixels, agree in absolute terms; labels where no two are as likely."""

    def check(actual: Any, expected: Any) -> None:
        for found, right in zip(actual, expected, strict=True):
            assert_close(found["scores"].float(), right["scores"], rtol=0, atol=score)
            assert_close(found["boxes"].float(), right["boxes"], rtol=0, atol=pixels)
            same = (found["labels"] == right["labels"]).float().mean().item()
            assert same >= 1 - 10 * score, f"only {same:.1%} of the labels"

    return check


def test_inference(case, bench):
    bench(case)


def ours(
    device: torch.device,
    flags: dict[str, Any],
    weights: Weights,
    given: Problem,
    sizes: Tensor,
    check: Check | None = None,
) -> Contender:
    """What evaluations do with these flags."""
    run = build_run(device, flags, weights)
    run.model.eval()
    postprocess = PostProcess()

    def detect() -> list[dict[str, Tensor]]:
        with chosen_ops(run.config), torch.no_grad():
            return postprocess(run.infer(given.bytes.images), sizes)

    def checked() -> list[dict[str, Tensor]]:
        for _ in range(STEPS_TO_CAPTURE if run.config.cuda_graphs == "on" else 0):
            detect()
        return detect()

    def held() -> int:
        return bytes_of([*run.model.parameters(), *run.model.buffers()]) + graph_bytes()

    slow = flags.get("compile") == "on"
    before = memory_of(device, fast=run.config.backend == "fast")
    return Contender(detect, checked, check, slow_start=slow, before=before, held=held)


def inference(device: torch.device, flags: dict[str, Any], images: list[tuple[int, int]]) -> Setup:
    """Scores, labels and boxes of all queries."""
    weights = random_weights(flags)
    given = problem(device, images, 1, 7)
    sizes = torch.tensor(images, device=device)
    in_bf16 = agreement(2e-2, 8.0)
    contender = functools.partial(ours, device, weights=weights, given=given, sizes=sizes)
    theirs = functools.partial(
        transformers_detr.inference_contender, device, config_of(flags), weights, given, sizes
    )
    fast = {"attention": "sdpa", "bf16": True, "check": in_bf16}
    contenders = {
        OURS: contender(flags | OFF),
        OURS_BF16: contender(flags | BF16, check=in_bf16),
        "reference": contender(flags | REFERENCE),
        TRANSFORMERS: theirs(),
        TRANSFORMERS_BF16: theirs(**fast),
    }
    if device.type == "cuda":
        contenders |= {
            f"{OURS_BF16} --compile on": contender(flags | COMPILED, check=in_bf16),
            f"{OURS_BF16} --cuda_graphs on": contender(flags | GRAPHED, check=in_bf16),
            f"{OURS_BF16} --compile on --cuda_graphs on": contender(flags | GRAPHS, check=in_bf16),
            f"{TRANSFORMERS_BF16}, compile": theirs(**fast, slow_start=True),
        }
    return Setup(contenders["reference"].run, contenders)
