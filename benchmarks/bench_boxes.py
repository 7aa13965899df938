# SPDX-License-Identifier: Apache-2.0
"""Box ops, float32, against torchvision and against torch.compile of the reference twin.

Pairwise: queries x targets of DETR and of DINO, and the proposals of a one-stage detector; the
gradient is that of the first side, as in training, where targets need none.  Matched: L1 and GIoU
losses of N pairs, for which the original DETR takes the diagonal of an N x N matrix.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender, Missing, Setup, compiled, optional, within
from detr_fast import ops, reference

PAIRWISE = [(100, 7), (900, 50), (8400, 100)]
MATCHED = [100, 1000]
FLOAT = 4  # bytes
VALUES = within(atol=1e-6)
GRADIENTS = within(atol=1e-3, rtol=1e-4)  # sums of up to 100 terms, added in another order

Inputs = tuple[Tensor, Tensor]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All cases; with `quick` the smallest shape of each op."""
    result = []
    for n, m in PAIRWISE[:1] if quick else PAIRWISE:
        name = f"generalized_box_iou {n}x{m}"
        boxes, matrix = (n + m) * 4 * FLOAT, n * m * FLOAT
        build = functools.partial(pairwise, device, n, m, forward)
        result.append(Case(f"{name} forward", build, VALUES, bytes=boxes + matrix))
        # the backward reads boxes and the gradient of the matrix, writes that of boxes1
        moved = 2 * (boxes + matrix) + n * 4 * FLOAT
        build = functools.partial(pairwise, device, n, m, with_gradient)
        result.append(Case(f"{name} forward+backward", build, GRADIENTS, bytes=moved))
    for n in MATCHED[:1] if quick else MATCHED:
        # reads src, tgt (4 + 4), writes two losses; reads them and two gradients, writes one of src
        moved = (4 + 4 + 2 + 4 + 4 + 2 + 4) * n * FLOAT
        build = functools.partial(matched, device, n)
        result.append(Case(f"matched_box_losses {n} forward+backward", build, GRADIENTS, moved))
    return result


def test_boxes(case, bench):
    bench(case)


def pairwise(device: torch.device, n: int, m: int, direction: Callable) -> Setup:
    """(n, 4), (m, 4) -> (n, m)."""
    inputs = corners(n, seed=1).to(device), corners(m, seed=2).to(device)
    return contenders(
        direction,
        inputs,
        ours=ops.generalized_box_iou,
        twin=reference.generalized_box_iou,
        peers={"torchvision": torchvision_giou()},
    )


def matched(device: torch.device, n: int) -> Setup:
    """(n, 4), (n, 4) -> (n,), (n,)."""
    inputs = centres(n, seed=1).to(device), centres(n, seed=2).to(device)
    giou = torchvision_giou()
    diagonal = giou if isinstance(giou, Missing) else functools.partial(losses_of_diagonal, giou)
    return contenders(
        with_gradient,
        inputs,
        ours=ops.matched_box_losses,
        twin=reference.matched_box_losses,
        peers={"DETR (torchvision)": diagonal},
    )


def losses_of_diagonal(pairwise_giou: Callable, src: Tensor, tgt: Tensor) -> Inputs:
    """The original DETR's losses: all N x N pairs are computed, those of the diagonal used."""
    corners_of_both = map(reference.box_cxcywh_to_xyxy, (src, tgt))
    l1 = torch.nn.functional.l1_loss(src, tgt, reduction="none").sum(1)
    return l1, 1 - torch.diag(pairwise_giou(*corners_of_both))


def torchvision_giou() -> Callable | Missing:
    torchvision = optional("torchvision")
    if isinstance(torchvision, Missing):
        return torchvision
    return torchvision.ops.generalized_box_iou


def contenders(
    direction: Callable, inputs: Inputs, ours: Callable, twin: Callable, peers: dict
) -> Setup:
    """The op, its peers, and its compiled twin, on the same inputs in the same direction."""
    outputs = forward(twin, inputs, None)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(o.shape, generator=generator).to(o) for o in outputs]
    if direction is with_gradient:
        inputs[0].requires_grad_()

    def contender(op: Callable | Missing, **options: bool) -> Contender | Missing:
        if isinstance(op, Missing):
            return op
        return Contender(functools.partial(direction, op, inputs, weights), **options)

    return Setup(
        expected=functools.partial(direction, twin, inputs, weights),
        contenders={
            "detr_fast": contender(ours),
            # torchvision asserts on values: it waits for the GPU
            **{name: contender(op, waits=True) for name, op in peers.items()},
            "torch.compile": contender(compiled(twin), slow_start=True),
        },
    )


def forward(op: Callable, inputs: Inputs, weights: list[Tensor] | None) -> tuple[Tensor, ...]:
    """Outputs of `op`, always as a tuple."""
    outputs = op(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_gradient(op: Callable, inputs: Inputs, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of `op`, and the gradient of its first input under these weights."""
    outputs = forward(op, inputs, weights)
    return *outputs, *torch.autograd.grad(outputs, inputs[0], weights)


def corners(count: int, seed: int) -> Tensor:
    """Random boxes (count, 4) as corners, none without area."""
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, count, 2, generator=generator)
    return torch.cat([low, low + 0.01 + size / 2], dim=1)


def centres(count: int, seed: int) -> Tensor:
    """The same boxes as centre and size."""
    low, high = corners(count, seed).split(2, dim=1)
    return torch.cat([(low + high) / 2, high - low], dim=1)
