# SPDX-License-Identifier: Apache-2.0
"""What set_loss promises to torch and to its callers: opcheck, compile, few launches, errors."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.engine.dispatched import dispatched
from detr_fast.ops.criterion import ClassLoss
from tests.cudasim import simulated
from tests.ops.loss_cases import (
    CROSS_ENTROPY,
    FOCAL,
    KINDS,
    loss_case,
    loss_weights,
    run,
)
from tests.ops.match_cases import DETR, random_case

OPS = torch.ops.detr_fast
KIND_NUMBERS = {"cross_entropy": 0, "focal": 1, "varifocal": 2}


def arguments(case, status=None, class_weight=None, num_boxes=None):
    """Of the op itself."""
    kind, alpha, gamma = case.options["class_loss"]
    t = case.targets
    return (
        *(list(case.logits), list(case.boxes), t.labels, t.boxes, t.count, case.match),
        *(status, class_weight, num_boxes, KIND_NUMBERS[kind], alpha, gamma),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@KINDS
def test_passes_opcheck(machine, class_loss, dtype):
    case = loss_case((3, 0, 7), 9, class_loss=class_loss, device=machine)
    case = case._replace(logits=case.logits.to(dtype).unbind(), boxes=case.boxes.unbind())
    arithmetic = torch.promote_types(dtype, torch.float32)
    status = torch.zeros(2, 3, 1, dtype=torch.int32, device=machine)
    number = torch.tensor(3.0, dtype=arithmetic, device=machine)
    weight = None if class_loss is not CROSS_ENTROPY else number.expand(11)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        logits, boxes = (
            [x.clone().requires_grad_(need) for x in side]
            for side, need in zip(case[:2], needs, strict=True)
        )
        inputs = arguments(case._replace(logits=logits, boxes=boxes), status, weight, number)
        torch.library.opcheck(OPS.set_loss.default, inputs)
    logits, boxes, *tensors, _, weight, _, kind, alpha, gamma = arguments(case, status, weight)
    losses, softmax, divisor = OPS.set_loss(*arguments(case, status, weight))
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(
            OPS.set_loss_backward.default,
            (
                *(loss_weights(losses), logits, boxes, *tensors, weight, softmax, divisor),
                *(kind, alpha, gamma, *needs),
            ),
        )


def training_loss(logits, boxes, targets, class_loss=CROSS_ENTROPY):
    """What a step computes between a model's outputs and its backward."""
    match = ops.hungarian_match(logits, boxes, targets, DETR)
    losses = ops.set_loss(logits, boxes, targets, match, class_loss=class_loss)
    return (losses * torch.tensor([1.0, 5, 2, 0, 0]).to(losses)).sum()


@KINDS
def test_compiles_without_breaks_and_once_for_a_bucket(machine, class_loss):
    """Counts change from batch to batch; the padded size, 8 or 16, seldom does."""
    torch._dynamo.reset()
    compiled = torch.compile(training_loss, fullgraph=True)
    for seed, counts in enumerate([(3, 0, 7), (8, 1, 2), (0, 0, 5)]):
        logits, boxes, targets = random_case(counts, 20, seed=seed, device=machine)
        results = []
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            for call in (compiled, training_loss):
                inputs = [t.clone().requires_grad_() for t in (logits, boxes)]
                loss = call(*inputs, targets, class_loss)
                results.append((loss, torch.autograd.grad(loss, inputs)))
        assert_close(*results)


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
def test_a_step_is_a_constant_number_of_ops(machine, listed):
    """Matching, losses, weighted sum and backward, of any number of layers and images."""
    counted = []
    for layers, images in ((1, 1), (4, 6), (16, 6)):
        logits, boxes, targets = random_case([2] * images, 6, layers, device=machine)
        leaves = [x.detach() for side in (logits, boxes) for x in (side if listed else [side])]
        inputs = [leaf.requires_grad_() for leaf in leaves]
        half = len(inputs) // 2
        sides = (inputs[:half], inputs[half:]) if listed else inputs

        def step(sides=sides, targets=targets, inputs=inputs):
            torch.autograd.grad(training_loss(*sides, targets), inputs)

        names = dispatched(step)
        assert names.count("detr_fast.set_loss.default") == 1
        assert names.count("detr_fast.set_loss_backward.default") == 1
        counted.append(names)
    assert counted[0] == counted[1] == counted[2]
    assert len(counted[0]) <= 20


def test_autocast_changes_nothing(machine):
    case = loss_case((3, 7), 20, device=machine)
    expected = run(ops.set_loss, case)
    with torch.autocast(machine.type, torch.bfloat16):
        for _ in range(2):
            assert_close(run(ops.set_loss, case), expected, rtol=0, atol=0)


@KINDS
def test_is_differentiable_once(machine, class_loss):
    case = loss_case((3, 7), 20, class_loss=class_loss, device=machine)
    logits = case.logits.requires_grad_()
    losses = ops.set_loss(logits, case.boxes, case.targets, case.match, class_loss=class_loss)
    (grad,) = torch.autograd.grad(losses.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_errors_have_no_gradient(device):
    case = loss_case((3, 1), 5, device=device)
    ours = run(ops.set_loss, case, weigh=lambda g: torch.cat([g[:, :3] * 0, g[:, 3:]], 1))
    for gradient in (*ours.logits, *ours.boxes):
        assert gradient.eq(0).all()
    without = ops.set_loss(*case[:4])
    assert not without.requires_grad


@KINDS
def test_does_not_depend_on_the_number_of_threads(class_loss):
    case = loss_case((9, 0, 30, 17, 2), 150, 92, class_loss, layers=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(ops.set_loss, case)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_close(run(ops.set_loss, case), alone, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@KINDS
def test_does_not_depend_on_the_schedule(needs_simulator, class_loss):
    case = loss_case((3, 0), 35, 5, class_loss)
    outcomes = []
    for schedule in ("forward", "random"):
        with simulated(schedule=schedule):
            outcomes.append(run(ops.set_loss, case))
    assert_close(*outcomes, rtol=0, atol=0)


@KINDS
def test_is_the_same_every_time(gpu, class_loss):
    case = loss_case((9, 0, 30, 17, 2), 300, 92, class_loss, layers=6, device=gpu)
    first = run(ops.set_loss, case)
    for _ in range(5):
        assert_close(run(ops.set_loss, case), first, rtol=0, atol=0)


@KINDS
def test_inputs_stay_as_they_are(device, class_loss):
    weight = {"class_weight": torch.rand(11, device=device)}
    options = weight if class_loss is CROSS_ENTROPY else {}
    case = loss_case((3, 0), 5, class_loss=class_loss, device=device, **options)
    t = case.targets
    tensors = [*case[:2], t.labels, t.boxes, t.count, case.match, *options.values()]
    before = [tensor.clone() for tensor in tensors]
    run(ops.set_loss, case)
    assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


def step(case):
    """Losses and gradients by operations that do not touch the host."""
    inputs = [x.detach().requires_grad_() for x in case[:2]]
    losses = ops.set_loss(*inputs, case.targets, case.match, **case.options)
    return losses.detach(), *torch.autograd.grad(losses, inputs, torch.ones_like(losses))


@KINDS
def test_waits_for_nothing_and_replays_in_a_graph(gpu, class_loss):
    """Captured once on a stream of its own, for what stands in the tensors when it is replayed."""
    case = loss_case((3, 7), 100, 92, class_loss, device=gpu)
    step(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
        with torch.cuda.stream(stream):
            step(case)
            with torch.cuda.graph(graph, stream=stream):
                captured = step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    other = loss_case((8, 1), 100, 92, class_loss, seed=1, device=gpu)
    for name in ("labels", "boxes", "count"):
        getattr(case.targets, name).copy_(getattr(other.targets, name))
    for mine, its in zip((*case[:2], case.match), (*other[:2], other.match), strict=True):
        mine.copy_(its)
    graph.replay()
    assert_close(captured, step(other), rtol=0, atol=0)


@KINDS
def test_use_reference_puts_the_reference_in_place(class_loss):
    case = loss_case((3, 7), 20, class_loss=class_loss)
    with ops.use_reference():
        twin = run(ops.set_loss, case)
    assert_close(twin, run(reference.set_loss, case), rtol=0, atol=0)
    with ops.use_reference():
        names = dispatched(lambda: ops.set_loss(*case[:4], class_loss=class_loss))
    assert not any(name.startswith("detr_fast") for name in names)


CASE = loss_case((3, 7), 20)
TARGETS = CASE.targets
INTEGERS = torch.zeros(2, 2, 20, dtype=torch.int32)
WEIGHT = torch.ones(11)
BAD = {
    "no layer": ({"logits": [], "boxes": []}, "logits: expected at least one layer"),
    "boxes of a layer": (
        {"boxes": [CASE.boxes[0]]},
        "boxes: expected one tensor for each of the 2 layers of logits, got 1",
    ),
    "box": (
        {"boxes": CASE.boxes[..., :3]},
        r"boxes\[0\]: expected shape \(2, 20, 4\), got \(2, 20, 3\)",
    ),
    "queries": (
        {"boxes": [CASE.boxes[0], CASE.boxes[1, :, 1:]]},
        r"boxes\[1\]: expected shape \(2, 20, 4\), got \(2, 19, 4\)",
    ),
    "images": (
        {"logits": CASE.logits[:, :1]},
        r"logits\[0\]: expected shape \(2, \*, \*\), got \(1, 20, 11\)",
    ),
    "columns": ({"logits": CASE.logits[..., :0]}, r"logits\[0\]: expected at least one column"),
    "integers": (
        {"logits": CASE.logits.int()},
        r"logits\[0\]: expected dtype Float, Double, .* got Int",
    ),
    "mixed logits": (
        {"logits": [CASE.logits[0], CASE.logits[1].double()]},
        r"logits\[1\]: expected the dtype of logits\[0\], Float, got Double",
    ),
    "mixed boxes": (
        {"boxes": [CASE.boxes[0], CASE.boxes[1].half()]},
        r"boxes\[1\]: expected the dtype of boxes\[0\], Float, got Half",
    ),
    "labels": (
        {"targets": replace(TARGETS, labels=TARGETS.labels.int())},
        "labels: expected dtype Long, got Int",
    ),
    "flat labels": (
        {"targets": replace(TARGETS, labels=TARGETS.labels[0])},
        r"labels: expected shape \(\*, \*\), got \(8,\)",
    ),
    "target boxes": (
        {"targets": replace(TARGETS, boxes=TARGETS.boxes[:, 1:])},
        r"target_boxes: expected shape \(2, 8, 4\), got \(2, 7, 4\)",
    ),
    "integer target boxes": (
        {"targets": replace(TARGETS, boxes=TARGETS.labels[..., None].expand(2, 8, 4))},
        "target_boxes: expected dtype Float, Double, .* got Long",
    ),
    "count": (
        {"targets": replace(TARGETS, count=TARGETS.count.long())},
        "count: expected dtype Int, got Long",
    ),
    "counts": (
        {"targets": replace(TARGETS, count=TARGETS.count[:1])},
        r"count: expected shape \(2,\), got \(1,\)",
    ),
    "dtype of the match": ({"match": INTEGERS}, "target_of_query: expected dtype Long, got Int"),
    "layers of the match": (
        {"match": CASE.match[:1]},
        r"target_of_query: expected shape \(2, 2, 20\), got \(1, 2, 20\)",
    ),
    "class": (
        {"class_loss": ClassLoss("dice")},
        "class_loss: expected one of 'cross_entropy', 'focal', 'varifocal', got 'dice'",
    ),
    "class by name": (
        {"class_loss": "focal"},
        r"class_loss: expected ClassLoss\('focal'\), got 'focal'",
    ),
    "weights": (
        {"class_weight": WEIGHT[1:]},
        r"class_weight: expected shape \(11,\), got \(10,\)",
    ),
    "weights of a sigmoid": (
        {"class_weight": WEIGHT, "class_loss": FOCAL},
        "class_weight: only cross-entropy has weights of classes",
    ),
    "boxes to divide by": (
        {"num_boxes": torch.ones(1)},
        r"num_boxes: expected shape \(\), got \(1,\)",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(changed, message):
    names = ("logits", "boxes", "targets", "match")
    inputs = dict(zip(names, CASE[:4], strict=True))
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.set_loss(**inputs | changed)


STATUS = torch.zeros(2, 2, 1, dtype=torch.int32)
# arguments of the op itself, which the function does not let through
BAD_OF_OP = {
    "status": (6, STATUS.long(), "status: expected dtype Int, got Long"),
    "layers of the status": (6, STATUS[:1], r"status: expected shape \(2, 2, \*\), got \(1, 2, 1"),
    "type of the weights": (7, WEIGHT.double(), "class_weight: expected dtype Float, got Double"),
    "type of num_boxes": (8, WEIGHT[0].half(), "num_boxes: expected dtype Float, got Half"),
    "class": (9, 3, "class_loss: expected 0 to 2, got 3"),
}


@pytest.mark.parametrize(("index", "value", "message"), BAD_OF_OP.values(), ids=BAD_OF_OP)
def test_the_op_names_wrong_arguments(index, value, message):
    inputs = [*arguments(CASE)]
    inputs[index] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.set_loss(*inputs)


BAD_OF_BACKWARD = {
    "grad": (0, torch.ones(2, 4), r"grad: expected shape \(2, 5\), got \(2, 4\)"),
    "type of grad": (0, torch.ones(2, 5).double(), "grad: expected dtype Float, got Double"),
    "softmax": (8, torch.ones(2, 2, 19, 2), r"softmax: expected shape \(2, 2, 20, 2\), got"),
    "divisor": (9, torch.ones(2, 1), r"divisor: expected shape \(2, 2\), got \(2, 1\)"),
}


@pytest.mark.parametrize(
    ("index", "value", "message"), BAD_OF_BACKWARD.values(), ids=BAD_OF_BACKWARD
)
def test_the_backward_names_wrong_arguments(index, value, message):
    logits, boxes, *tensors, _, weight, _, kind, alpha, gamma = arguments(CASE)
    losses, softmax, divisor = OPS.set_loss(*arguments(CASE))
    inputs = [losses, logits, boxes, *tensors, weight, softmax, divisor, kind, alpha, gamma]
    inputs[index] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.set_loss_backward(*inputs, True, True)


@pytest.mark.parametrize("wrong", ["class", "class by name"])
def test_the_reference_refuses_the_same(wrong):
    changed, message = BAD[wrong]
    with ops.use_reference(), pytest.raises(ValueError, match=message):
        ops.set_loss(*CASE[:4], **changed)


@pytest.mark.parametrize("name", ["boxes", "labels", "target_boxes", "match", "class_weight"])
def test_names_a_tensor_on_another_device(gpu, name):
    case = loss_case((3, 7), 20, device=gpu, class_weight=WEIGHT.to(gpu))
    logits, boxes, targets, match, options = case
    if name == "boxes":
        boxes = boxes.cpu()
    elif name == "match":
        match = match.cpu()
    elif name == "class_weight":
        options = {"class_weight": WEIGHT}
    else:
        field = name.removeprefix("target_")
        targets = replace(targets, **{field: getattr(targets, field).cpu()})
    with pytest.raises(RuntimeError, match=r"expected the device of logits\[0\], cuda:0, got cpu"):
        ops.set_loss(logits, boxes, targets, match, **options)
