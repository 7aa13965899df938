# SPDX-License-Identifier: Apache-2.0
"""One tiny case of each kernel of csrc, as nvcc emits it, against the CPU op."""

import functools

import pytest
import torch
from torch.testing import assert_close

import detr_fast
from detr_fast.ops import hungarian_match, linear_sum_assignment, set_loss
from tests.cudasim.ptx import Memory
from tests.cudasim.ptx.emit import product_kernels, toolkit
from tests.cudasim.ptx.interpreted import interpreted
from tests.cudasim.simulate import MAX_SHARED_BYTES, scheduled, simulated
from tests.ops.assignment_problems import problems
from tests.ops.loss_cases import CROSS_ENTROPY, FOCAL, KINDS, VARIFOCAL, assert_near, loss_case, run
from tests.ops.match_cases import CLASS_COSTS, DETR, assert_same_match, random_case

# nvcc contracts products and sums; sums are added in another order
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}, torch.float64: {}}


def random_boxes(*sizes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, *sizes, 2, generator=generator, dtype=torch.float64)
    return torch.cat([low, low + 0.01 + size / 2], dim=-1).to(dtype)


# op, shapes of its two sets of boxes
CASES = {
    # more columns than a warp has lanes, two problems, an end of a block within the pairs
    "box_iou": (detr_fast.ops.box_iou, (2, 3, 4), (2, 37, 4)),
    "generalized_box_iou": (detr_fast.ops.generalized_box_iou, (2, 3, 4), (2, 37, 4)),
    # more rows than a block adds up for its columns
    "split rows": (detr_fast.ops.generalized_box_iou, (259, 4), (3, 4)),
    "generalized_box_iou_loss": (detr_fast.ops.generalized_box_iou_loss, (9, 4), (9, 4)),
    "matched_box_losses": (detr_fast.ops.matched_box_losses, (9, 4), (9, 4)),
}
RUNS = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.float64)]


@pytest.fixture(scope="module")
def home(needs_simulator):  # whose runtime the host side is linked to
    home, reason = toolkit()
    if home is None:
        pytest.skip(reason)
    return home


def values_and_gradients(case, dtype):
    op, *shapes = CASES[case]
    boxes = [
        random_boxes(*s[:-1], dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)
    ]
    outputs = op(*boxes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out) for out in outputs]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    return [out.detach() for out in outputs], [side.grad for side in boxes]


@functools.cache
def run_on_ptx(case, dtype, home):
    with interpreted(home) as interpreter:
        return values_and_gradients(case, dtype), interpreter.launched


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_emitted_kernel_equals_the_cpu_op(home, case, dtype):
    ours, launched = run_on_ptx(case, dtype, home)
    assert launched
    assert_close(ours, values_and_gradients(case, dtype), **TOLERANCE[dtype])


# options of linear_sum_assignment, the most shared memory: none needs a workspace, or all do
ASSIGNMENTS = [
    (options, most)
    for options in ((), (("ties", "scipy"),), (("algorithm", "auction"),))
    for most in (MAX_SHARED_BYTES, 200)
]


@functools.cache
def assign_on_ptx(options, most, dtype, home):
    """Ties and an augmentation; an odd count; costs that are not finite."""
    cost, count = problems("integers", 3, 9, 5, dtype=dtype), torch.tensor([5, 3, 4])
    cost[2, 3, 1] = torch.nan
    arguments = {"cost": cost, "count": count, "non_finite": "worst", **dict(options)}
    with scheduled(max_shared_bytes=most), interpreted(home) as interpreter:
        found = linear_sum_assignment(**arguments)
    return found, linear_sum_assignment(**arguments), interpreter.launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("options", "most"), ASSIGNMENTS)
def test_emitted_assignment_equals_the_cpu_op(home, options, most, dtype):
    found, expected, launched = assign_on_ptx(options, most, dtype, home)
    assert launched
    assert_close(found, expected)


# class cost, ties, the most shared memory; the interpreter has no pow, which the others call
MATCHES = [
    (class_cost, ties, most)
    for class_cost in ("softmax", "focal", "focal_logits")
    for ties in ("any", "scipy")
    for most in (MAX_SHARED_BYTES, 200)
]


@functools.cache
def match_on_ptx(class_cost, ties, most, dtype, home):
    """More queries than targets and fewer, a cost that is not finite, an image without targets."""
    logits, boxes, targets = random_case([3, 0, 7], 10, layers=1, columns=5)
    boxes[0, 0, 3, 2] = torch.nan
    case = logits.to(dtype), boxes.bfloat16(), targets, DETR, CLASS_COSTS[class_cost]
    options = {"groups": 2, "ties": ties, "non_finite": "worst"}
    with scheduled(max_shared_bytes=most), interpreted(home) as interpreter:
        found = hungarian_match(*case, **options)
    return found, hungarian_match(*case, **options), interpreter.launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("class_cost", "ties", "most"), MATCHES)
def test_emitted_match_equals_the_cpu_op(home, class_cost, ties, most, dtype):
    found, expected, launched = match_on_ptx(class_cost, ties, most, dtype, home)
    assert launched
    assert_same_match(found, expected)


@functools.cache
def losses_on_ptx(class_loss, dtype, home):
    """Two blocks an image; rows of groups of four, other rows, and halves; a free image."""
    case = loss_case([3, 0], 33, 12, class_loss, layers=2).to(dtype)
    logits = case.logits.bfloat16() if dtype == torch.float32 else case.logits
    narrow = case._replace(logits=[case.logits[0], case.logits[1, ..., :11]], boxes=[*case.boxes])
    cases = case._replace(logits=logits, boxes=case.boxes.half()), narrow
    with interpreted(home) as interpreter:
        found = [run(set_loss, case) for case in cases]
    return found, [run(set_loss, case) for case in cases], interpreter.launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@KINDS
def test_emitted_losses_equal_the_cpu_op(home, class_loss, dtype):
    found, expected, launched = losses_on_ptx(class_loss, dtype, home)
    assert launched
    half = 1e-2 if dtype == torch.float32 else 1e-3  # the rounding of the gradients
    for ours, theirs, rtol in zip(found, expected, (half, 1e-5), strict=True):
        assert_close(ours.losses, theirs.losses, rtol=1e-5, atol=0)
        assert_near(ours, theirs, rtol)


def attend(rows, dtype, dropout_p):
    """Two steps of tiles; a head of each of two images; output and gradients."""
    generator = torch.Generator().manual_seed(4)
    queries, keys, options = rows
    q, k, v, weight = (
        torch.randn(2, 1, length, 32, generator=generator).to(dtype).requires_grad_()
        for length in (queries, keys, keys, queries)
    )
    torch.manual_seed(5)  # of the seed for dropout
    out = detr_fast.ops.attention(q, k, v, dropout_p=dropout_p, **options)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


RECT = torch.tensor([[9, 8], [2, 9]], dtype=torch.int32)
ATTENTION = {  # as for the encoder, as for the decoder
    "rectangle": (90, 90, {"query_rect": RECT, "key_rect": RECT, "padded_width": 9}),
    "few queries": (20, 70, {"key_count": torch.tensor([70, 33], dtype=torch.int32)}),
}
ATTENTIONS = [
    (rows, dtype, dropout_p)
    for rows in ATTENTION
    for dtype in (torch.half, torch.bfloat16)
    for dropout_p in (0, 0.25)
]


@functools.cache
def attend_on_ptx(rows, dtype, dropout_p, home):
    with interpreted(home) as interpreter:
        found = attend(ATTENTION[rows], dtype, dropout_p)
    return found, interpreter.launched


@pytest.mark.parametrize(("rows", "dtype", "dropout_p"), ATTENTIONS)
def test_emitted_attention_equals_the_simulated(home, rows, dtype, dropout_p):
    found, launched = attend_on_ptx(rows, dtype, dropout_p, home)
    assert launched
    with simulated():
        expected = attend(ATTENTION[rows], dtype, dropout_p)
    step = torch.finfo(dtype).eps  # sums are rounded to it, in another order
    assert_close(found, expected, atol=step, rtol=2 * step)


NORMALIZED = (torch.float32, torch.half, torch.bfloat16)


@functools.cache
def normalize_on_ptx(dtype, home):
    """Three images that begin at each place in a vector, with padding: planes, pixels, neither."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (3, 3, 17, 17), dtype=torch.uint8, generator=generator)
    bytes_of_all = torch.arange(256, dtype=torch.uint8).expand(1, 3, -1).reshape(1, 3, 16, 16)
    pixels = images[..., :16].contiguous(memory_format=torch.channels_last)
    sizes = torch.tensor([[17, 17], [9, 16], [16, 5]], dtype=torch.int32)
    cases = (bytes_of_all, None), (images, sizes), (pixels, sizes), (images[..., ::2], sizes)
    with interpreted(home) as interpreter:
        found = [detr_fast.ops.normalize_images(*case, dtype=dtype) for case in cases]
    expected = [detr_fast.ops.normalize_images(*case, dtype=dtype) for case in cases]
    return found, expected, interpreter.launched


@pytest.mark.parametrize("dtype", NORMALIZED, ids=str)
def test_emitted_pixels_equal_the_cpu_op(home, dtype):
    found, expected, launched = normalize_on_ptx(dtype, home)
    assert launched
    assert_close(found, expected, atol=0, rtol=0)


def test_every_kernel_has_a_case(home):
    launched = set().union(*(run_on_ptx(case, dtype, home)[1] for case, dtype in RUNS))
    for dtype in (torch.float32, torch.float64):
        launched |= set().union(*(assign_on_ptx(*case, dtype, home)[2] for case in ASSIGNMENTS))
        launched |= set().union(*(match_on_ptx(*case, dtype, home)[2] for case in MATCHES))
        launched |= set().union(
            *(losses_on_ptx(loss, dtype, home)[2] for loss in (CROSS_ENTROPY, FOCAL, VARIFOCAL))
        )
    launched |= set().union(*(attend_on_ptx(*case, home)[1] for case in ATTENTIONS))
    launched |= set().union(*(normalize_on_ptx(dtype, home)[2] for dtype in NORMALIZED))
    assert launched == set(product_kernels(home))


def test_error_of_a_kernel_names_its_line(home, monkeypatch):
    boxes = random_boxes(3, dtype=torch.float32, seed=1)
    monkeypatch.setattr(Memory, "add", lambda *_, **__: 0)  # nothing may be touched
    with interpreted(home), pytest.raises(RuntimeError, match=r"no such memory.* at \w+\.\w+:\d+"):
        detr_fast.ops.generalized_box_iou(boxes, boxes)
