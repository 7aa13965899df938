# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of the compiled op against the reference twin, on every device."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.data import Targets
from detr_fast.ops.criterion import LOSS_COLUMNS, ClassLoss
from tests.ops.loss_cases import (
    CLASS_LOSSES,
    CROSS_ENTROPY,
    FOCAL,
    KINDS,
    VARIFOCAL,
    LossCase,
    assert_equals_reference,
    assert_near,
    expected,
    loss_case,
    loss_weights,
    random_match,
    run,
)
from tests.ops.match_cases import DETR, random_case

# an image without targets; more targets than queries, and as many; no targets at all; one class
SIZES = [((3, 0, 7), 20, 11), ((5, 2), 3, 33), ((0, 0), 5, 7), ((2, 4), 6, 2), ((1,), 1, 65)]


@pytest.mark.parametrize(("counts", "queries", "columns"), SIZES, ids=str)
@pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_equals_reference(device, class_loss, counts, queries, columns):
    case = loss_case(counts, queries, columns, class_loss, device=device)
    ours = assert_equals_reference(case)
    assert ours.losses.isfinite().all()
    assert_near(ours, run(reference.set_loss, case))


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 64, 91, 92, 366, 1203])
@pytest.mark.parametrize("queries", [1, 31, 32, 33, 100])
@KINDS
def test_equals_reference_at_the_ends_of_rows_and_blocks(machine, class_loss, queries, columns):
    counts = (0,) if columns == 1 and class_loss is CROSS_ENTROPY else (7, 0, 3)
    case = loss_case(counts, queries, columns, class_loss, layers=1, device=machine)
    assert_equals_reference(case)


@KINDS
def test_one_column(device, class_loss):
    """The only class of a sigmoid; of a softmax there is only no-object."""
    counts = (0, 0) if class_loss is CROSS_ENTROPY else (2, 0)
    ours = assert_equals_reference(loss_case(counts, 4, 1, class_loss, device=device))
    assert_close(ours.losses[:, 3], ours.losses.new_full((2,), sum(counts) / 2))


@pytest.mark.parametrize("no_object", [0.1, 0.0])
def test_classes_have_weights(device, no_object):
    g = torch.Generator().manual_seed(1)
    weight = torch.rand(11, generator=g) + 0.1
    weight[-1] = no_object
    for values in (weight.to(device), weight.to(device).repeat_interleave(3)[::3], weight.double()):
        case = loss_case((3, 0, 7), 20, class_weight=values.to(device), device=device)
        assert_equals_reference(case)


def test_weights_of_zero_leave_nothing_to_average(device):
    """As in torch: 0 / 0."""
    case = loss_case((0, 0), 4, class_weight=torch.eye(11, device=device)[0], device=device)
    ours = assert_equals_reference(case)
    assert ours.losses[:, 0].isnan().all()
    assert ours.losses[:, 1:3].eq(0).all()


@pytest.mark.parametrize("num_boxes", [3, 2.5, torch.tensor(4.25), torch.tensor(7)], ids=str)
@KINDS
def test_num_boxes_is_what_the_caller_says(device, class_loss, num_boxes):
    if isinstance(num_boxes, torch.Tensor):
        num_boxes = num_boxes.to(device)
    case = loss_case((3, 0), 5, class_loss=class_loss, num_boxes=num_boxes, device=device)
    ours = assert_equals_reference(case)
    default = run(ops.set_loss, case._replace(options={"class_loss": class_loss}))
    ratio = 3 / float(num_boxes)
    assert_close(ours.losses[:, 1:3], default.losses[:, 1:3] * ratio, rtol=1e-6, atol=0)


@KINDS
@pytest.mark.parametrize("counts", [(), (0,)], ids=str)
def test_without_images_targets_or_queries(device, class_loss, counts):
    for queries in (0, 3):
        case = loss_case(counts, queries, 4, class_loss, device=device)
        none = replace(
            case.targets, labels=case.targets.labels[:, :0], boxes=case.targets.boxes[:, :0]
        )
        for targets in (case.targets, none):
            assert_equals_reference(case._replace(targets=targets))


@KINDS
def test_padding_is_not_read(device, class_loss):
    case = loss_case((3, 0, 7), 12, class_loss=class_loss, device=device)
    before = run(ops.set_loss, case)
    targets = case.targets.to(device)
    labels, boxes = targets.labels.clone(), targets.boxes.clone()
    for image, n in enumerate(targets.count_host):
        labels[image, n:] = 2**62
        boxes[image, n:] = torch.inf
    other = case._replace(targets=replace(targets, labels=labels, boxes=boxes))
    assert_close(run(ops.set_loss, other), before, rtol=0, atol=0)
    assert_near(before, expected(other))


@KINDS
def test_counts_beyond_the_padding_are_clamped(device, class_loss):
    case = loss_case((8, 0), 9, class_loss=class_loss, device=device)
    wild = torch.tensor([100, -3], dtype=torch.int32, device=device)
    ours = assert_equals_reference(case._replace(targets=replace(case.targets, count=wild)))
    assert_close(ours, run(ops.set_loss, case), rtol=0, atol=0)


@pytest.mark.parametrize("class_loss", [FOCAL, VARIFOCAL], ids=lambda loss: loss.kind)
def test_layers_differ_in_queries_and_columns(device, class_loss):
    """An encoder's layer beside those of a decoder; queries and columns beyond a layer's own."""
    sizes = [(9, 11), (2, 34), (12, 5), (0, 7)]
    cases = [loss_case((3, 4), q, 5, class_loss, layers=1, seed=q, device=device) for q, _ in sizes]
    targets = cases[0].targets
    match = torch.full((4, 2, 12), -1, device=device)
    for row, (queries, _) in zip(match, sizes, strict=True):
        row[:, :queries] = random_match(targets, 1, queries, seed=queries)[0]
    match[0, 0, 9:] = 77  # beyond the queries of this layer
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, q, c, generator=g).to(device) for q, c in sizes]
    case = LossCase(logits, [c.boxes[0] for c in cases], targets, match, {"class_loss": class_loss})
    assert_equals_reference(case)


def test_layers_of_a_softmax_differ(device):
    """Columns may differ where they have no weights."""
    case = loss_case((3, 4), 9, 11, device=device)
    small = loss_case((3, 4), 4, 13, seed=1, layers=1, device=device)
    match = torch.full((3, 2, 9), -1, device=device)
    match[:2], match[2, :, :4] = case.match, small.match[0]
    logits, boxes = ([*case[side], small[side][0]] for side in (0, 1))
    assert_equals_reference(case._replace(logits=logits, boxes=boxes, match=match))


@KINDS
def test_more_layers_than_one_launch_takes(device, class_loss):
    assert_equals_reference(loss_case((2,), 6, 4, class_loss, layers=35, device=device))


@KINDS
def test_a_list_is_as_good_as_a_stack(device, class_loss):
    case = loss_case((3, 0), 5, class_loss=class_loss, device=device)
    listed = case._replace(logits=list(case.logits), boxes=list(case.boxes))
    assert_close(run(ops.set_loss, listed), run(ops.set_loss, case), rtol=0, atol=0)


@KINDS
def test_takes_any_strides(device, class_loss):
    case = loss_case((3, 0, 7), 9, class_loss=class_loss, device=device)
    before = run(ops.set_loss, case)
    t = case.targets
    sparse = Targets(
        torch.stack([t.labels] * 2, -1)[..., 0],
        t.boxes.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([t.count] * 2, -1)[..., 0],
        t.count_host,
    )
    apart = LossCase(
        case.logits.mT.contiguous().mT,
        torch.stack([case.boxes, case.boxes], -1).flatten(-2)[..., ::2],
        sparse,
        case.match.transpose(0, 1).contiguous().transpose(0, 1),
        case.options,
    )
    tensors = *apart[:2], sparse.labels, sparse.boxes, sparse.count, apart.match
    assert not any(tensor.is_contiguous() for tensor in tensors)
    assert_close(run(ops.set_loss, apart), before, rtol=0, atol=0)
    by_image = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case[:2]]
    assert_close(
        run(ops.set_loss, case._replace(logits=by_image[0], boxes=by_image[1])),
        before,
        rtol=0,
        atol=0,
    )
    same = [x[:1, :1].expand(2, 3, 9, -1) for x in case[:2]]
    assert_equals_reference(case._replace(logits=list(same[0]), boxes=list(same[1])))
    gaps = run(ops.set_loss, case, weigh=lambda g: g.repeat_interleave(3, -1)[..., ::3])
    assert_close(gaps, before, rtol=0, atol=0)


@pytest.mark.parametrize(("groups", "repeat"), [(3, 1), (1, 2), (2, 3)])
@KINDS
def test_takes_a_match_of_groups_and_repeated_targets(device, class_loss, groups, repeat):
    inputs = random_case([2, 0, 5], 12, device=device)
    match = ops.hungarian_match(*inputs, DETR, groups=groups, repeat=repeat)
    assert (match.target_of_query[:, 0] == 0).sum(-1).eq(groups * repeat).all()
    case = LossCase(*inputs, match, {"class_loss": class_loss})
    ours = assert_equals_reference(case)
    found = case._replace(match=match.target_of_query)
    assert_close(run(ops.set_loss, found), ours, rtol=0, atol=0)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_boxes", FLOATS, ids=str)
@pytest.mark.parametrize("of_logits", FLOATS, ids=str)
@KINDS
def test_takes_every_dtype(device, class_loss, of_logits, of_boxes):
    """Gradients are those of the arithmetic, rounded once."""
    case = loss_case((3, 1), 6, class_loss=class_loss, device=device)
    arithmetic = torch.promote_types(of_logits, torch.float32)
    typed = case._replace(logits=case.logits.to(of_logits), boxes=case.boxes.to(of_boxes))
    typed = typed._replace(targets=replace(typed.targets, boxes=typed.targets.boxes.to(of_boxes)))
    ours, same = run(ops.set_loss, typed), run(ops.set_loss, typed.to(arithmetic))
    assert ours.losses.dtype == arithmetic
    assert_close(ours.losses, same.losses, rtol=0, atol=0)
    assert_close(ours.logits, [g.to(of_logits) for g in same.logits], rtol=0, atol=0)
    assert_close(ours.boxes, [g.to(of_boxes) for g in same.boxes], rtol=0, atol=0)


@KINDS
def test_large_logits_lose_nothing(device, class_loss):
    """Confident queries whose logits differ in their last digits only."""
    case = loss_case((3, 4), 9, class_loss=class_loss, device=device)
    # an IoU near 0 is a small difference of large numbers, in any order
    rtol = 3e-6 if class_loss is VARIFOCAL else 1e-6
    for large in (case.logits + 1e4, case.logits - 1e4, case.logits * 1e4):
        assert assert_equals_reference(case._replace(logits=large), rtol).losses.isfinite().all()


@KINDS
def test_minus_infinity_rules_out_a_column(device, class_loss):
    """It is as if the column were not there."""
    case = loss_case((3, 4), 9, 6, class_loss=class_loss, device=device)
    logits = torch.full((2, 2, 9, 10), -torch.inf, device=device)
    columns = torch.tensor([0, 1, 3, 5, 8, 9], device=device)
    logits[..., columns] = case.logits
    labels = columns[case.targets.labels.clamp(0, 5)]
    ours = run(
        ops.set_loss, case._replace(logits=logits, targets=replace(case.targets, labels=labels))
    )
    without = expected(case)
    masked = torch.ones(10, dtype=torch.bool, device=device)
    masked[columns] = False
    for gradient in ours.logits:
        assert gradient[..., masked].eq(0).all()
    kept = ours._replace(logits=[gradient[..., columns] for gradient in ours.logits])
    assert_near(kept, without)


@KINDS
def test_the_first_of_equal_logits_is_the_prediction(device, class_loss):
    case = loss_case((2, 1), 4, 40, class_loss, layers=1, device=device)
    logits = case.logits.round() / 4  # ties everywhere
    logits[0, 0] = 0  # of all columns: the first one, so that no query is free
    labels = case.targets.labels.clone()
    labels[0, :2] = torch.tensor([0, 1], device=device)
    tied = case._replace(logits=logits, targets=replace(case.targets, labels=labels))
    assert_equals_reference(tied)
    match = torch.full((1, 2, 4), -1, device=device)
    match[0, 0, 1], match[0, 0, 2] = 0, 1
    ours = run(ops.set_loss, tied._replace(match=match))
    assert ours.losses[0, 4] == 50  # label 0 is predicted, label 1 is not


def test_errors_by_hand(device):
    """Layer 0: 2 of 3 matched queries are right, 2 and 1 objects are seen where 3 and 0 are."""
    targets = Targets.from_list(
        [
            {"labels": torch.tensor([0, 1, 2]), "boxes": torch.rand(3, 4) + 0.1},
            {"labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)},
        ]
    ).to(device)
    seen = torch.tensor([[[0, 1, 3, 3], [3, 3, 0, 3]], [[3, 3, 3, 3], [3, 3, 3, 3]]])
    logits, boxes = torch.eye(4)[seen].to(device), torch.rand(2, 2, 4, 4, device=device)
    match = torch.tensor([[[0, 1, 2, -1], [-1] * 4], [[-1] * 4, [-1] * 4]], device=device)
    losses = ops.set_loss(logits, boxes, targets, match)
    assert LOSS_COLUMNS[3:] == ("cardinality_error", "class_error")
    errors = [[(1 + 1) / 2, 100 / 3], [3 / 2, 100]]  # 100 where nothing is matched
    assert_close(losses[:, 3:], torch.tensor(errors, device=device))


@KINDS
def test_one_side_alone_has_the_same_gradient(device, class_loss):
    """Nor is anything made for a side that needs none, or for one layer of the other."""
    case = loss_case((3, 0), 5, class_loss=class_loss, device=device)
    both = run(ops.set_loss, case)
    for side, gradients in enumerate((both.logits, both.boxes)):
        layers = [list(x.unbind()) for x in case[:2]]
        leaf = layers[side][1].clone().requires_grad_()
        layers[side][1] = leaf
        losses = ops.set_loss(*layers, case.targets, case.match, **case.options)
        (gradient,) = torch.autograd.grad(losses, leaf, loss_weights(losses))
        assert_close(gradient, gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "class_loss",
    [CROSS_ENTROPY, FOCAL, ClassLoss("focal", -1.0, 1.5)],
    ids=["cross_entropy", "focal", "focal of gamma 1.5"],
)
def test_passes_gradcheck(device, class_loss):
    """Varifocal takes no gradient of its weights: see the reference."""
    case = loss_case((2, 0), 3, 4, class_loss, device=device).to(torch.float64)

    def losses(logits, boxes):
        return ops.set_loss(logits, boxes, case.targets, case.match, **case.options)

    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in case[:2]])
