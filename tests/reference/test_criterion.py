# SPDX-License-Identifier: Apache-2.0
"""The reference losses against those of DETR, Deformable DETR and RT-DETR, restated."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_fast.data import Targets
from detr_fast.reference.criterion import ClassLoss, set_loss
from tests.matcher.published import published_match
from tests.ops.loss_cases import CROSS_ENTROPY, FOCAL, KINDS, VARIFOCAL, loss_case, run
from tests.test_criterion import COSTS, COUNTS, EOS, layers_of, published_layer

vision = pytest.importorskip("torchvision.ops")
CLASSES = 9


def matched_layers(counts, dtype=torch.float32):
    """Two decoder layers with leaves that collect gradients, targets, and the target of queries."""
    outputs, targets, leaves = layers_of(counts, CLASSES, layers=2, dtype=dtype)
    layers = [outputs, *outputs.pop("aux_outputs")]
    found = torch.full((2, len(counts), leaves[0].shape[1]), -1)
    for of_layer, layer in zip(found, layers, strict=True):
        for row, (queries, chosen) in zip(
            of_layer, published_match(layer, targets, **COSTS), strict=True
        ):
            row[queries] = chosen
    return layers, targets, found, leaves


def losses_of(layers, targets, found, **options):
    logits, boxes = ([layer[name] for layer in layers] for name in ("pred_logits", "pred_boxes"))
    packed = Targets.from_list(targets)
    packed = replace(packed, boxes=packed.boxes.to(boxes[0]))
    return set_loss(logits, boxes, packed, found, **options)


def assert_same_gradients(ours, theirs, leaves):
    """Under weights that no two losses have in common."""
    weights = torch.arange(1.0, 1 + ours.numel()).view(ours.shape).to(ours)
    options = {"allow_unused": True, "materialize_grads": True}
    assert_close(
        torch.autograd.grad(ours, leaves, weights, **options),
        torch.autograd.grad(theirs, leaves, weights, **options),
    )


@pytest.mark.parametrize("num_boxes", [None, 4.5, torch.tensor(4.5)], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_detr(counts, num_boxes):
    layers, targets, found, leaves = matched_layers(counts)
    weight = torch.ones(CLASSES + 1)
    weight[-1] = EOS
    ours = losses_of(layers, targets, found, class_weight=weight, num_boxes=num_boxes)
    divisor = max(sum(counts), 1) if num_boxes is None else float(num_boxes)
    names = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error", "class_error")
    published = [published_layer(layer, targets, divisor) for layer in layers]
    theirs = torch.stack([torch.stack([layer[name] for name in names]) for layer in published])
    assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, leaves)


def test_weight_of_every_class_is_that_of_torch():
    layers, targets, found, leaves = matched_layers([7, 0, 4], torch.float64)
    weight = torch.rand(CLASSES + 1, generator=torch.Generator().manual_seed(0))
    ours = losses_of(layers, targets, found, class_weight=weight)[:, :1]
    cross_entropy = torch.nn.CrossEntropyLoss(weight.double())
    theirs = []
    for layer, of_layer in zip(layers, found, strict=True):
        classes = classes_of(of_layer, targets)
        theirs.append(cross_entropy(layer["pred_logits"].transpose(1, 2), classes))
    theirs = torch.stack(theirs)[:, None]
    assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, leaves)


def classes_of(found, targets):
    """The class of each query (B, Q), as published: CLASSES where it is free."""
    classes = torch.full(found.shape, CLASSES)
    for row, of_image, target in zip(classes, found, targets, strict=True):
        row[of_image >= 0] = target["labels"][of_image[of_image >= 0]]
    return classes


def one_hot_of(classes):
    """(B, Q, CLASSES), zeros where a query is free: cut off as published."""
    return F.one_hot(classes, CLASSES + 1)[..., :-1]


def sigmoid_layers(counts, dtype=torch.float32):
    """The same without a column of no-object."""
    layers, targets, found, leaves = matched_layers(counts, dtype)
    for layer in layers:
        layer["pred_logits"] = layer["pred_logits"][..., :CLASSES]
    return layers, targets, found, leaves


@pytest.mark.parametrize("options", [(0.25, 2.0), (-1.0, 2.0), (0.7, 1.5), (0.5, 0.0)], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_focal_equals_deformable_detr(counts, options):
    layers, targets, found, leaves = sigmoid_layers(counts)
    ours = losses_of(layers, targets, found, class_loss=ClassLoss("focal", *options))[:, :1]
    theirs = []
    for layer, of_layer in zip(layers, found, strict=True):
        logits, one_hot = layer["pred_logits"], one_hot_of(classes_of(of_layer, targets))
        loss = vision.sigmoid_focal_loss(logits, one_hot.to(logits), *options)
        theirs.append(loss.mean(1).sum() / max(sum(counts), 1) * logits.shape[1])
    theirs = torch.stack(theirs)[:, None]
    assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, leaves)


@pytest.mark.parametrize("options", [(0.75, 2.0), (0.2, 1.5)], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_varifocal_equals_rt_detr(counts, options):
    alpha, gamma = options
    layers, targets, found, leaves = sigmoid_layers(counts)
    ours = losses_of(layers, targets, found, class_loss=ClassLoss("varifocal", *options))[:, :1]
    theirs = []
    for layer, of_layer in zip(layers, found, strict=True):
        logits, one_hot = layer["pred_logits"], one_hot_of(classes_of(of_layer, targets))
        matched = of_layer >= 0
        chosen = [t["boxes"][row[row >= 0]] for t, row in zip(targets, of_layer, strict=True)]
        corners = (
            vision.box_convert(boxes, "cxcywh", "xyxy")
            for boxes in (layer["pred_boxes"][matched], torch.cat(chosen))
        )
        iou = torch.diag(vision.box_iou(*corners)).detach()
        score = torch.zeros(matched.shape)
        score[matched] = iou
        score = score[..., None] * one_hot
        weight = alpha * logits.sigmoid().detach().pow(gamma) * (1 - one_hot) + score
        loss = F.binary_cross_entropy_with_logits(logits, score, weight=weight, reduction="none")
        theirs.append(loss.mean(1).sum() * logits.shape[1] / max(sum(counts), 1))
    theirs = torch.stack(theirs)[:, None]
    assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, leaves)


def test_sigmoid_losses_by_hand():
    """Two queries, two classes, one target: the equations of both papers."""
    logits = torch.tensor([[[[0.5, -1.0], [2.0, 0.25]]]], dtype=torch.float64)
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.4]]]], dtype=torch.float64)
    targets = Targets.from_list(
        [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
    )
    match = torch.tensor([[[-1, 0]]])
    p = 1 / (1 + torch.exp(-logits[0, 0]))
    (p00, p01), (p10, p11) = p
    negative = sum(q**2 * -torch.log(1 - q) for q in (p00, p01, p10))
    focal = 0.75 * negative + 0.25 * (1 - p11) ** 2 * -torch.log(p11)
    u = (0.1 * 0.4) / (2 * 0.2 * 0.4 - 0.1 * 0.4)
    varifocal = 0.75 * negative - u * (u * torch.log(p11) + (1 - u) * torch.log(1 - p11))
    for class_loss, expected in ((FOCAL, focal), (VARIFOCAL, varifocal)):
        (losses,) = set_loss(logits, boxes, targets, match, class_loss=class_loss)
        assert_close(losses[0], expected, rtol=1e-6, atol=0)
        assert_close(losses[1:3], losses.new_tensor([0.1, 1 - u]), rtol=1e-5, atol=0)
        # the largest logit of both is column 0: two objects, and the class, column 1, is missed
        assert losses[3:].tolist() == [1, 100]


@KINDS
def test_half_precision_is_computed_in_float32(class_loss):
    case = loss_case((3, 1), 6, class_loss=class_loss)
    half = case._replace(logits=case.logits.bfloat16(), boxes=case.boxes.half())
    ours = run(set_loss, half)
    expected = run(set_loss, half._replace(logits=half.logits.float(), boxes=half.boxes.float()))
    assert ours.losses.dtype == torch.float32
    assert_close(ours.losses, expected.losses, rtol=0, atol=0)
    assert_close(ours.logits, [g.bfloat16() for g in expected.logits], rtol=0, atol=0)
    assert_close(ours.boxes, [g.half() for g in expected.boxes], rtol=0, atol=0)


@pytest.mark.parametrize("where", [(0, 0, 3), (0, 0, 77)], ids=str)
def test_a_target_that_there_is_not_makes_its_layer_nan(where):
    case = loss_case((3, 1), 6)
    case.match[1, 0, 2] = where[-1]
    losses = set_loss(*case[:4], class_loss=CROSS_ENTROPY)
    assert losses[1, :3].isnan().all()
    assert losses[0].isfinite().all()
