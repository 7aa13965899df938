# SPDX-License-Identifier: Apache-2.0
"""The losses of a batch against the published expression and against transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_fast.criterion import SetCriterion, loss_weights
from detr_fast.matcher import HungarianMatcher
from tests.matcher.published import corners, giou_matrix, published_match, random_batch

pytest.importorskip("scipy")
COSTS = {"cost_class": 1, "cost_bbox": 5, "cost_giou": 2}
LOSSES = ["labels", "boxes", "cardinality"]
EOS = 0.1
COUNTS = [[7, 3], [0, 5, 1], [0, 0], [25, 4, 0], [1]]
QUERIES = 12


def build(classes, criterion=SetCriterion, losses=LOSSES):
    return criterion(classes, HungarianMatcher(**COSTS), loss_weights(2), EOS, losses)


def published_layer(outputs, targets, num_boxes):
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    pairs = published_match(outputs, targets, **COSTS)
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
    query = torch.cat([q for q, _ in pairs])
    labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, pairs, strict=True)])
    target_boxes = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, pairs, strict=True)])

    no_object = logits.shape[-1] - 1
    classes = torch.full(logits.shape[:2], no_object)
    classes[image, query] = labels
    picked = -logits.log_softmax(-1).gather(2, classes[..., None])[..., 0]
    weight = torch.where(classes == no_object, EOS, 1.0).to(logits)
    src = boxes[image, query]
    predicted = (logits.argmax(-1) != no_object).sum(1)
    lengths = torch.tensor([len(t["labels"]) for t in targets])
    matched = (logits[image, query].argmax(-1) == labels).float()
    return {
        "loss_ce": (picked * weight).sum() / weight.sum(),
        "class_error": 100 - 100 * (matched.mean() if len(matched) else torch.tensor(0.0)),
        "loss_bbox": F.l1_loss(src, target_boxes, reduction="sum") / num_boxes,
        "loss_giou": (1 - giou_matrix(corners(src), corners(target_boxes)).diag()).sum()
        / num_boxes,
        "cardinality_error": (predicted - lengths).abs().float().mean(),
    }


def published_losses(outputs, targets):
    num_boxes = max(sum(len(t["labels"]) for t in targets), 1)
    losses = published_layer(outputs, targets, num_boxes)
    for i, layer in enumerate(outputs.get("aux_outputs", [])):
        values = published_layer(layer, targets, num_boxes)
        losses |= {f"{k}_{i}": v for k, v in values.items() if k != "class_error"}
    return losses


def layers_of(counts, classes, layers=3, dtype=torch.float32, seed=0):
    """Outputs with auxiliary layers, all leaves that collect a gradient, and targets."""
    outputs, targets = random_batch(counts, QUERIES, classes, seed, dtype)
    aux = [random_batch(counts, QUERIES, classes, 100 + i, dtype)[0] for i in range(layers - 1)]
    leaves = [value.requires_grad_() for layer in (outputs, *aux) for value in layer.values()]
    return outputs | {"aux_outputs": aux}, targets, leaves


def gradients(losses, leaves):
    """Of a sum that weights each loss differently, so that no two can be exchanged."""
    named = {name: value for name, value in sorted(losses.items()) if name.startswith("loss_")}
    total = sum((i + 1) * value for i, value in enumerate(named.values()))
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("classes", [1, 9])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_published(counts, classes):
    for seed in range(3):
        outputs, targets, leaves = layers_of(counts, classes, seed=seed)
        ours = build(classes)(outputs, targets)
        expected = published_losses(outputs, targets)
        assert_close(ours, expected)
        assert_close(gradients(ours, leaves), gradients(expected, leaves))


def test_equals_published_in_float64():
    outputs, targets, leaves = layers_of([7, 0, 14], 9, dtype=torch.float64)
    ours, expected = build(9)(outputs, targets), published_losses(outputs, targets)
    assert_close(
        {k: v.double() for k, v in ours.items()}, {k: v.double() for k, v in expected.items()}
    )
    assert ours["loss_giou"].dtype == torch.float64
    assert_close(gradients(ours, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_transformers(counts):
    hf = pytest.importorskip("transformers.loss.loss_for_object_detection")
    outputs, targets, leaves = layers_of(counts, 9)
    criterion = build(9)
    ours = criterion(outputs, targets)

    def renamed(layer):
        return {"logits": layer["pred_logits"], "pred_boxes": layer["pred_boxes"]}

    matcher = hf.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    their_targets = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    for layer in (outputs, *outputs["aux_outputs"]):
        assert_close(criterion.matcher(layer, targets), matcher(renamed(layer), their_targets))

    their_outputs = renamed(outputs)
    their_outputs["auxiliary_outputs"] = [renamed(layer) for layer in outputs["aux_outputs"]]
    theirs = hf.ImageLoss(matcher, 9, EOS, LOSSES)(their_outputs, their_targets)
    assert ours.keys() - theirs.keys() == {"class_error"}
    assert_close({name: ours[name] for name in theirs}, theirs)
    assert_close(gradients(ours, leaves), gradients(theirs, leaves))


def test_class_error_by_hand():
    targets = [{"labels": torch.tensor([0, 1, 2]), "boxes": torch.rand(3, 4) + 0.1}]
    logits = torch.eye(4)[[0, 1, 1, 3]]
    outputs = {"pred_logits": logits[None], "pred_boxes": torch.rand(1, 4, 4) + 0.1}
    outputs["pred_boxes"][0, :3] = targets[0]["boxes"]
    losses = build(3)(outputs, targets)
    assert_close(losses["class_error"], torch.tensor(100 / 3))
    assert_close(losses["cardinality_error"], torch.tensor(0.0))
    assert_close(losses["loss_giou"], torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_computes_half_precision_in_float32(dtype):
    outputs, targets, _ = layers_of([7, 3], 9, layers=1)
    half = {n: outputs[n].detach().to(dtype) for n in ("pred_logits", "pred_boxes")}
    leaves = [value.requires_grad_() for value in half.values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = build(9)(half, targets)
    expected = published_losses({name: value.float() for name, value in half.items()}, targets)
    assert_close(losses, expected)
    for grad, leaf in zip(gradients(losses, leaves), leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.isfinite().all()


def test_predictions_without_area_have_finite_losses_and_gradients():
    outputs, targets, leaves = layers_of([7, 3], 9, layers=1)
    with torch.no_grad():
        outputs["pred_boxes"][:, ::2, 2:] = 0
        outputs["pred_boxes"][:, 1::2] = outputs["pred_boxes"][:, 1:2]  # all the same
        outputs["pred_boxes"][0, 3] = targets[0]["boxes"][0]  # every comparison is a tie
    losses = build(9)(outputs, targets)
    assert_close(losses, published_losses(outputs, targets))
    for grad in gradients(losses, leaves):
        assert grad.isfinite().all()


def test_boxes_are_compared_pair_by_pair():
    """Nothing of the size of pairs times pairs is made, not even with a large batch."""
    g = torch.Generator().manual_seed(0)
    n = 500
    outputs = {"pred_boxes": torch.rand(1, n, 4, generator=g).requires_grad_()}
    targets = [{"labels": torch.zeros(n).long(), "boxes": torch.rand(n, 4, generator=g)}]
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        build(9).loss_boxes(outputs, targets, [(torch.arange(n), torch.arange(n))], n)
    assert 4 * n in sizes
    assert max(sizes) < n * n


def test_loss_weights_name_every_loss_that_trains():
    outputs, targets, _ = layers_of([2], 9, layers=3)
    losses = build(9)(outputs, targets)
    weights = loss_weights(3, ce_loss_coef=1.5, bbox_loss_coef=4, giou_loss_coef=3)
    assert weights.keys() == {name for name, value in losses.items() if value.requires_grad}
    expected = {"loss_ce": 1.5, "loss_bbox": 4, "loss_giou": 3}
    assert {name: weights[name] for name in expected} == expected
    assert {name: weights[f"{name}_1"] for name in expected} == expected
    assert loss_weights(6, aux_loss=False) == {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}


def test_only_the_losses_asked_for_are_computed():
    outputs, targets, _ = layers_of([2], 9, layers=2)
    losses = build(9, losses=["cardinality", "labels"])(outputs, targets)
    assert list(losses) == [
        "cardinality_error",
        "loss_ce",
        "class_error",
        "cardinality_error_0",
        "loss_ce_0",
    ]


def test_empty_weight_is_a_buffer_that_weights_no_object():
    criterion = build(3)
    assert_close(criterion.state_dict()["empty_weight"], torch.tensor([1, 1, 1, EOS]))
    outputs, targets, _ = layers_of([0], 3, layers=1)
    everywhere = build(3)(outputs, targets)["loss_ce"]
    assert_close(everywhere, -outputs["pred_logits"].log_softmax(-1)[..., 3].mean())


def test_num_boxes_is_the_mean_over_processes(monkeypatch):
    """Two processes, of which the other one has 21 boxes."""

    def all_reduce(tensor):
        tensor += 21

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    outputs, targets, _ = layers_of([7, 0], 9)
    losses = build(9)(outputs, targets)
    monkeypatch.undo()
    alone = build(9)(outputs, targets)
    for name in ("loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_1"):
        assert_close(losses[name], alone[name] * 7 / 14)
    assert_close(losses["loss_ce"], alone["loss_ce"])


def test_num_boxes_of_a_process_group_is_one_at_least(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        outputs, targets, leaves = layers_of([0, 0], 9)
        losses = build(9)(outputs, targets)
        grads = gradients(losses, leaves)
    finally:
        torch.distributed.destroy_process_group()
    assert_close(losses["loss_bbox"], torch.tensor(0.0))
    assert all(grad.isfinite().all() for grad in grads)


def test_a_subclass_replaces_and_adds_losses():
    class Scaled(SetCriterion):
        def loss_labels(self, outputs, targets, indices, num_boxes, log=True):
            values = super().loss_labels(outputs, targets, indices, num_boxes, log=log)
            return values | {"loss_ce": 2 * values["loss_ce"]}

        def loss_matched(self, outputs, targets, indices, num_boxes):
            batch, target = self._get_tgt_permutation_idx(indices)
            labels = torch.stack(
                [targets[b]["labels"][t] for b, t in zip(batch, target, strict=True)]
            )
            logits = outputs["pred_logits"][self._get_src_permutation_idx(indices)]
            return {"loss_matched": F.cross_entropy(logits, labels, reduction="sum") / num_boxes}

    outputs, targets, _ = layers_of([7, 3], 9, layers=2)
    plain = build(9)(outputs, targets)
    scaled = build(9, Scaled, [*LOSSES, "matched"])(outputs, targets)
    assert_close(scaled.pop("loss_matched") > 0, torch.tensor(True))
    assert_close(scaled.pop("loss_matched_0") > 0, torch.tensor(True))
    for name, value in plain.items():
        assert_close(scaled.pop(name), 2 * value if name.startswith("loss_ce") else value)
    assert not scaled


def test_losses_run_outside_of_autocast():
    class Linear(SetCriterion):
        def loss_linear(self, outputs, targets, indices, num_boxes):
            return {"loss_linear": outputs["pred_boxes"][0] @ torch.ones(4)}

    outputs, targets, _ = layers_of([2], 9, layers=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build(9, Linear, ["linear"])(outputs, targets)["loss_linear"].dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("focal", "unknown loss 'focal'; known are boxes, cardinality, labels"),
        ("masks", "unknown loss 'masks' .panoptic heads are not in this version."),
    ],
)
def test_names_a_loss_that_it_does_not_know(loss, message):
    outputs, targets, _ = layers_of([2], 9, layers=1)
    with pytest.raises(ValueError, match=message):
        build(9, losses=["labels", loss])(outputs, targets)


@pytest.mark.parametrize("label", [-1, 9])
def test_names_a_label_out_of_range(label):
    """9 of 9 classes would be learned as no-object: silently, were it not refused."""
    outputs, targets, _ = layers_of([2, 4, 0], 9, layers=1)
    targets[1]["labels"][2] = label
    with pytest.raises(ValueError, match=rf"image 1: label {label} is outside of \[0, 9\)"):
        build(9)(outputs, targets)


def test_names_a_head_of_another_size():
    outputs, targets, _ = layers_of([2], 9, layers=1)
    with pytest.raises(ValueError, match=r"expected 6 columns .* got shape \(1, 12, 10\)"):
        build(5)(outputs, targets)


def test_names_layer_and_image_of_nan_logits():
    outputs, targets, _ = layers_of([2, 4], 9)
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_logits"][1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"aux_outputs\[1\], image 1: .* pred_logits hold NaN"):
        build(9)(outputs, targets)
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_logits"][1, 0] = 0
        outputs["pred_logits"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="last decoder layer, image 0"):
        build(9)(outputs, targets)
