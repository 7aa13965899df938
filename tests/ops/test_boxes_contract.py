# SPDX-License-Identifier: Apache-2.0
"""What every box op promises to torch: opcheck, compile, autocast, capture, no sync, its errors."""

import inspect
import warnings

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from tests.ops.test_boxes import MATCHED, NAN, PAIRWISE, random_boxes, run

COMPOSITES = ["box_area", "box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh"]
NOT_OPS = {"backend", "check_boxes", "use_reference"}
NOT_OPS |= {"ClassCost", "ClassLoss", "CostWeights", "Match", "MatchStatus"}


def arguments(name, device, dtype=torch.float32):
    sizes = (5, 3) if name in PAIRWISE else (4, 4)
    boxes = [random_boxes(n, device=device, dtype=dtype, seed=n) for n in sizes]
    return boxes[:1] if name in COMPOSITES else boxes


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_passes_opcheck(machine, name, needs):
    boxes = arguments(name, machine)
    options = [0.25] if name == "generalized_box_iou_loss" else []
    op = getattr(torch.ops.detr_fast, name).default
    values = op(*boxes, *options)
    grads = [torch.ones_like(v) for v in (values if isinstance(values, tuple) else [values])]
    backward = getattr(torch.ops.detr_fast, f"{name}_backward").default
    torch.library.opcheck(backward, (*grads, *boxes, *options, *needs))
    inputs = [b.clone().requires_grad_(need) for b, need in zip(boxes, needs, strict=True)]
    torch.library.opcheck(op, (*inputs, *options))


@pytest.mark.parametrize("name", PAIRWISE + MATCHED + COMPOSITES)
def test_compiles_without_graph_break(machine, name):
    op = getattr(ops, name)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    boxes = arguments(name, machine)
    assert_close(run(compiled, *boxes), run(op, *boxes))


def test_inductor_compiles_a_training_loss(machine):
    """Both losses of a sum, in the graph that a training step would have."""

    def loss(src, tgt):
        l1, giou_loss = ops.matched_box_losses(src.sigmoid(), tgt)
        return 5 * l1.sum() / 4 + 2 * giou_loss.sum() / 4

    boxes = arguments("matched_box_losses", machine)
    assert_close(run(torch.compile(loss, fullgraph=True), *boxes), run(loss, *boxes))


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_autocast_changes_nothing(machine, name):
    boxes = arguments(name, machine)
    expected = run(getattr(ops, name), *boxes)
    with torch.autocast(machine.type, torch.bfloat16):
        for _ in range(2):  # autocast keeps casts of leaves between two uses
            assert_close(run(getattr(ops, name), *boxes), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_gradients_come_with_gaps_between_them(device, name):
    boxes = arguments(name, device)
    op = getattr(ops, name)
    gaps = run(op, *boxes, weigh=lambda g: g.repeat_interleave(3, -1)[..., ::3])
    assert_close(gaps, run(op, *boxes), atol=0, rtol=0)


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_is_differentiable_once(machine, name):
    boxes = arguments(name, machine)[0].requires_grad_()
    values = getattr(ops, name)(boxes, boxes.detach())
    total = sum(v.square().sum() for v in (values if isinstance(values, tuple) else [values]))
    (grad,) = torch.autograd.grad(total, boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_do_not_depend_on_the_number_of_threads(name):
    boxes = random_boxes(3, 700, seed=1), random_boxes(3, 90, seed=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(getattr(ops, name), *boxes)
        torch.set_num_threads(3)
        assert_close(run(getattr(ops, name), *boxes), alone, atol=0, rtol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("count", [0, 7])
def test_generalized_box_iou_loss_reduces(reduction, count):
    boxes = random_boxes(count), random_boxes(count, seed=1)
    losses = ops.generalized_box_iou_loss(*boxes)
    expected = losses.sum() if reduction == "sum" or not count else losses.mean()
    assert_close(ops.generalized_box_iou_loss(*boxes, reduction=reduction), expected)


ZEROS = torch.zeros(3, 4)
BAD = {
    "width": (torch.zeros(3, 5), ZEROS, r"1: expected shape \(\.\.\., (N, )?4\), got \(3, 5\)"),
    "dims": (ZEROS, torch.zeros(4), r"2: expected shape .*, got \(4,\)"),
    "leading": (torch.zeros(2, 3, 4), ZEROS, r"2: expected shape \(2, [*3], 4\), got \(3, 4\)"),
    "mixed": (ZEROS, ZEROS.double(), "2: expected the dtype of .*1, Float, got Double"),
    "integer": (ZEROS.int(), ZEROS.int(), r"1: expected dtype Float or Double, got Int; call "),
}


@pytest.mark.parametrize(("boxes1", "boxes2", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_names_bad_input(device, name, boxes1, boxes2, message):
    message = "boxes" + message
    if name == "matched_box_losses":
        message = message.replace("boxes1", "src").replace("boxes2", "tgt").replace(".*1", "src")
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(boxes1.to(device), boxes2.to(device))


def test_names_a_bad_reduction():
    with pytest.raises(ValueError, match="got 'Mean'"):
        ops.generalized_box_iou_loss(ZEROS, ZEROS, reduction="Mean")


@pytest.mark.parametrize("bad", [[1, 0, 0, 1], [0, 0, 1, NAN]], ids=str)
@pytest.mark.parametrize("name", [*PAIRWISE, MATCHED[0]])
def test_check_boxes_finds_a_bad_box(name, bad):
    good, boxes = random_boxes(3), random_boxes(3)
    boxes[1] = torch.tensor(bad)
    op = getattr(ops, name)
    with ops.check_boxes("sync"):
        op(good, good)
        with pytest.raises(ValueError, match=r"boxes2\[1\]: expected x0 <= x1 .*, got \[.* of 3"):
            op(good, boxes)
        with ops.use_reference(), pytest.raises(ValueError, match=r"boxes1\[1\]"):
            op(boxes, good)
    with ops.check_boxes("async"), pytest.raises(RuntimeError, match="boxes2: expected x0 <= x1"):
        op(good, boxes)
    with ops.check_boxes("async"):
        op(good, good)
        with ops.check_boxes("off"):
            op(good, boxes)
    op(good, boxes)  # nothing is checked outside of any context


def test_check_boxes_knows_centre_and_size():
    boxes = random_boxes(2, 3)
    bad = boxes.clone()
    bad[1, 2, 3] = -0.5
    with ops.check_boxes("sync"), pytest.raises(ValueError, match=r"src\[1, 2\]: expected w >= 0"):
        ops.matched_box_losses(bad, boxes)
    with ops.check_boxes("async"), pytest.raises(RuntimeError, match="tgt: expected w >= 0"):
        ops.matched_box_losses(boxes, bad)


def test_check_boxes_names_a_bad_policy():
    with pytest.raises(ValueError, match='"off", "async" or "sync"'), ops.check_boxes("always"):
        pass


def test_compiles_with_asynchronous_checks(machine):
    compiled = torch.compile(ops.generalized_box_iou, fullgraph=True, backend="aot_eager")
    boxes = arguments("generalized_box_iou", machine)
    with ops.check_boxes("async"):
        assert_close(compiled(*boxes), ops.generalized_box_iou(*boxes))


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_does_not_wait_for_the_gpu(gpu, name):
    boxes = arguments(name, gpu)
    run_without_weights(getattr(ops, name), boxes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_without_weights(getattr(ops, name), boxes)
        with ops.check_boxes("async"):
            run_without_weights(getattr(ops, name), [b.cumsum(-1) for b in boxes])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", PAIRWISE + MATCHED)
def test_is_captured_in_a_graph_on_a_side_stream(gpu, name):
    boxes = arguments(name, gpu)
    op, stream = getattr(ops, name), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autograd names the streams of accumulated gradients
        run_without_weights(op, boxes)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run_without_weights(op, boxes)
    torch.cuda.current_stream().wait_stream(stream)
    for b in boxes:
        b.mul_(0.5).add_(0.1)
    graph.replay()
    assert_close(captured, run_without_weights(op, boxes))


@pytest.mark.parametrize("name", PAIRWISE)
def test_allocates_the_result_and_no_other_matrix(gpu, name):
    boxes = [random_boxes(n, device=gpu).requires_grad_() for n in (4096, 1024)]
    matrix = 4096 * 1024 * 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = getattr(ops, name)(*boxes)
    values.backward(torch.ones((), device=gpu).expand_as(values))
    assert torch.cuda.max_memory_allocated() - before < 1.2 * matrix


def run_without_weights(op, boxes):
    """Values and gradients by operations that do not touch the host."""
    boxes = [b.detach().requires_grad_() for b in boxes]
    values = op(*boxes)
    values = values if isinstance(values, tuple) else (values,)
    gradients = torch.autograd.grad(sum(v.sum() for v in values), boxes)
    return [v.detach() for v in values], list(gradients)


def test_reference_has_the_same_signature():
    def shape(function):
        parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
        return [(p.name, p.default) for p in parameters]

    names = set(ops.__all__) - NOT_OPS
    assert names <= set(reference.__all__)
    for name in names:
        assert shape(getattr(ops, name)) == shape(getattr(reference, name))


def test_use_reference_puts_the_reference_in_place():
    boxes = random_boxes(3).requires_grad_()
    compiled = ops.generalized_box_iou(boxes, boxes).grad_fn
    with ops.use_reference():
        assert ops.backend()["cpu"].startswith("reference")
        twin = ops.generalized_box_iou(boxes, boxes).grad_fn
    assert ops.backend()["cpu"].startswith("compiled")
    assert type(compiled) is not type(twin)
