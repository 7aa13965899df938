# SPDX-License-Identifier: Apache-2.0
"""What hungarian_match promises to torch and to its callers: opcheck, compile, errors, pairs."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.data import Targets
from detr_fast.ops.matcher import ClassCost, CostWeights
from tests.ops.match_cases import DETR, assert_same_match, random_boxes, random_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_passes_opcheck(machine, dtype):
    logits, boxes, targets = random_case([3, 0, 7], 20, device=machine)
    logits = logits.to(dtype).unbind()
    extra = [torch.rand(3, 20, 8, device=machine) for _ in logits]
    for groups, repeat, extra_cost in [(1, 1, []), (2, 3, extra)]:
        torch.library.opcheck(
            torch.ops.detr_fast.hungarian_match.default,
            (
                *(logits, boxes.unbind(), targets.labels, targets.boxes, targets.count),
                *(extra_cost, DETR, 1, [0.25, 2.0, 1e-8], groups, repeat, True, 1, []),
            ),
        )


def set_loss(logits, boxes, targets):
    """A toy criterion: matched probabilities and L1 distances."""
    match = ops.hungarian_match(logits, boxes, targets, DETR, ClassCost("focal"))
    found = match.query_of_target >= 0
    query = match.query_of_target.clamp(min=0)[..., None]
    near = boxes.gather(2, query.expand(-1, -1, -1, 4)) - targets.boxes
    likely = logits.softmax(-1).gather(2, query.expand(-1, -1, -1, logits.shape[-1])).amax(-1)
    zero = torch.zeros((), device=logits.device)
    return (
        torch.where(found[..., None], near.abs(), zero).sum()
        - torch.where(found, likely, zero).sum()
    )


def test_compiles_without_breaks_and_once_for_a_bucket(machine):
    """Counts change from batch to batch; the padded size, 8 or 16, seldom does."""
    torch._dynamo.reset()
    compiled = torch.compile(set_loss, fullgraph=True)
    for seed, counts in enumerate([(3, 0, 7), (8, 1, 2), (0, 0, 5)]):
        logits, boxes, targets = random_case(counts, 20, seed=seed, device=machine)
        results = []
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            for call in (compiled, set_loss):
                inputs = [t.clone().requires_grad_() for t in (logits, boxes)]
                loss = call(*inputs, targets)
                results.append((loss, torch.autograd.grad(loss, inputs)))
        assert_close(*results)


def test_compiled_match_has_no_pairs():
    case = random_case([3, 7], 20)
    match = torch.compile(ops.hungarian_match, backend="eager", fullgraph=True)(*case, DETR)
    assert_close(match[:4], ops.hungarian_match(*case, DETR)[:4], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"match outside of torch\.compile"):
        match.pairs()


def test_is_never_part_of_a_graph(machine):
    logits, boxes, targets = random_case([3, 7], 20, device=machine)
    expected = ops.hungarian_match(logits, boxes, targets, DETR)
    match = ops.hungarian_match(logits.requires_grad_(), boxes.requires_grad_(), targets, DETR)
    assert not match.cost.requires_grad
    assert_same_match(match, expected)


def test_autocast_changes_nothing(machine):
    case = random_case([3, 7], 20, device=machine)
    expected = ops.hungarian_match(*case, DETR)
    with torch.autocast(machine.type, torch.bfloat16):
        match = ops.hungarian_match(*case, DETR)
    assert match.cost.dtype == torch.float32
    assert_close(match, expected, rtol=0, atol=0)


def test_does_not_depend_on_the_number_of_threads():
    case = random_case([9, 0, 30, 17, 2], 150, columns=92)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.hungarian_match(*case, DETR)
        torch.set_num_threads(3)
        assert_close(ops.hungarian_match(*case, DETR), alone, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_waits_for_nothing_and_replays_in_a_graph(gpu):
    """Captured once, for the counts that stand in the tensors when it is replayed."""
    logits, boxes, targets = random_case([3, 7], 100, device=gpu)
    ops.hungarian_match(logits, boxes, targets, DETR)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.hungarian_match(logits, boxes, targets, DETR).pairs()
        with torch.cuda.graph(graph):
            match = ops.hungarian_match(logits, boxes, targets, DETR)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    others = random_case([8, 1], 100, seed=1, device=gpu)
    for mine, other in zip((logits, boxes), others[:2], strict=True):
        mine.copy_(other)
    for name in ("labels", "boxes", "count"):
        getattr(targets, name).copy_(getattr(others[2], name))
    graph.replay()
    assert_close(match[:4], ops.hungarian_match(*others, DETR)[:4])


def test_pairs_are_those_of_detr(machine):
    logits, boxes, targets = random_case([3, 0, 7], 20, device=machine)
    match = ops.hungarian_match(logits, boxes, targets, DETR)
    for layer, images in enumerate(match.pairs()):
        for image, (queries, chosen) in enumerate(images):
            assert queries.dtype == chosen.dtype == torch.int64
            assert queries.tolist() == sorted(set(queries.tolist()))
            assert chosen.sort()[0].tolist() == list(range(targets.count_host[image]))
            assert_close(match.query_of_target[layer, image][chosen], queries)
            assert_close(match.target_of_query[layer, image][queries], chosen)


@pytest.mark.parametrize(("groups", "repeat"), [(4, 1), (1, 3), (2, 2)])
def test_pairs_count_through_groups_and_repeats(machine, groups, repeat):
    """As if each group were a model of its own, and each target there several times."""
    logits, boxes, targets = random_case([2, 0, 3], 24, device=machine)
    match = ops.hungarian_match(logits, boxes, targets, DETR, groups=groups, repeat=repeat)
    size = 24 // groups
    for layer, images in enumerate(match.pairs()):
        for image, (queries, chosen) in enumerate(images):
            n = targets.count_host[image]
            one = Targets.from_list(
                [
                    {
                        "labels": targets.labels[image, :n].repeat(repeat),
                        "boxes": targets.boxes[image, :n].repeat(repeat, 1),
                    }
                ]
            )
            alone = []
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                inputs = (t[layer : layer + 1, image : image + 1, part] for t in (logits, boxes))
                found, target = ops.hungarian_match(*inputs, one, DETR).pairs()[0][0]
                alone += zip(
                    (found + group * size).tolist(), (target % max(1, n)).tolist(), strict=True
                )
            ours = zip(queries.tolist(), (chosen % max(1, n)).tolist(), strict=True)
            assert list(ours) == alone
            assert chosen.bincount(minlength=n * repeat).eq(groups).all()


def test_status_is_read_only_when_asked(machine):
    logits, boxes, targets = random_case([3, 7], 20, device=machine)
    logits[1, 1, 4, 2] = torch.nan
    match = ops.hungarian_match(logits, boxes, targets, DETR, non_finite="worst")
    with pytest.raises(
        ValueError, match=r"layer 1, image 1: .*not finite in the term cost_class: "
    ):
        match.raise_for_status()
    targets.labels[0, 1] = 11
    match = ops.hungarian_match(logits, boxes, targets, DETR, non_finite="worst")
    with pytest.raises(ValueError, match="layer 0, image 0: a label is outside of the columns"):
        match.raise_for_status()


LOGITS, BOXES, TARGETS = random_case([3, 7], 20)
BAD = {
    "no layer": ({"logits": [], "boxes": []}, "at least one layer"),
    "boxes of a layer": ({"boxes": [BOXES[0]]}, "boxes: expected one tensor for each of the 2"),
    "box": ({"boxes": BOXES[..., :3]}, r"boxes\[0\]: expected shape \(2, 20, 4\), got .*20, 3\)"),
    "images": ({"logits": LOGITS[:, :1]}, r"logits\[0\]: expected shape \(2, \*, \*\), got \(1, "),
    "dtype": ({"logits": LOGITS.int()}, r"logits\[0\]: expected dtype Float, Double, .* got Int"),
    "mixed": ({"logits": [LOGITS[0], LOGITS[1].double()]}, r"logits\[1\]: expected the dtype of"),
    "labels": (
        {"targets": replace(TARGETS, labels=TARGETS.labels.int())},
        "labels: expected dtype",
    ),
    "count": (
        {"targets": replace(TARGETS, count=TARGETS.count.long())},
        "count: expected dtype Int",
    ),
    "extra": ({"extra_cost": BOXES}, r"extra_cost\[0\]: expected shape \(2, 20, 8\), got .*20, 4"),
    "weights": ({"weights": CostWeights(0, 0, 0)}, "nothing to match by"),
    "groups": ({"groups": 3}, "20.* queries.* cannot be cut into 3 equal groups"),
    "repeat": ({"repeat": 0}, "repeat: expected at least 1, got 0"),
    "class": ({"class_cost": ClassCost("dice")}, "class_cost: expected one of 'softmax', .*'dice'"),
    "ties": ({"ties": "none"}, "ties: expected one of 'any', 'scipy', got 'none'"),
    "policy": (
        {"non_finite": "ignore"},
        "non_finite: expected one of 'error', 'worst', 'status', got",
    ),
    "replacement": ({"non_finite": (0.0, 1.0)}, "got 2 numbers"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(changed, message):
    arguments = {"logits": LOGITS, "boxes": BOXES, "targets": TARGETS, "weights": DETR} | changed
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.hungarian_match(**arguments)


@pytest.mark.parametrize("wrong", ["groups", "weights"])
def test_the_reference_refuses_the_same(wrong):
    changed, message = BAD[wrong]
    arguments = {"logits": LOGITS, "boxes": BOXES, "targets": TARGETS, "weights": DETR} | changed
    with pytest.raises(ValueError, match=message):
        reference.hungarian_match(**arguments)


def test_layers_may_be_any_sequence():
    generator = torch.Generator().manual_seed(0)
    boxes = [random_boxes(2, 20, generator=generator) for _ in range(2)]
    stacked = ops.hungarian_match(LOGITS, torch.stack(boxes), TARGETS, DETR)
    assert_same_match(ops.hungarian_match(tuple(LOGITS), boxes, TARGETS, DETR), stacked)
