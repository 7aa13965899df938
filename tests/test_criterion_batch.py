# SPDX-License-Identifier: Apache-2.0
"""How SetCriterion asks its matcher and calls its losses, for all decoder layers at once."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detr_fast import HungarianMatcher, SetCriterion, Targets, ops
from detr_fast.criterion import loss_weights, weighted_losses
from detr_fast.engine.dispatched import dispatched
from detr_fast.matcher import deformable_detr, dino
from detr_fast.ops import ClassLoss
from detr_fast.ops.layers import unbind_layers
from detr_fast.reference import set_loss
from tests.matcher.published import published_match
from tests.test_criterion import COSTS, EOS, LOSSES, build, gradients, layers_of

pytest.importorskip("scipy")
COUNTS = [7, 0, 3]
VARIFOCAL = ClassLoss("varifocal", 0.75)


class ListMatcher(nn.Module):
    """A matcher of another code base: pairs of one layer, and nothing else."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        return published_match(outputs, targets, **COSTS)


class FirstQueries(HungarianMatcher):
    """Overrides what a call for one layer gives, and knows nothing of a call for all."""

    def forward(self, outputs, targets):
        return [(torch.arange(len(t["labels"])),) * 2 for t in targets]


def with_matcher(matcher, **options):
    return SetCriterion(9, matcher, loss_weights(3), EOS, LOSSES, **options)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_evaluates_without_gradients(mode):
    outputs, targets, _ = layers_of(COUNTS, 9)
    expected = build(9)(outputs, targets)
    with mode():
        losses = build(9)(outputs, targets)
        total, _ = weighted_losses(losses, loss_weights(3))
    assert_close(losses, {name: value.detach() for name, value in expected.items()})
    assert not total.requires_grad


def test_packed_targets_give_the_same():
    outputs, targets, leaves = layers_of(COUNTS, 9)
    one = build(9)(outputs, targets)
    other = build(9)(outputs, Targets.from_list(targets))
    assert list(one) == list(other)
    assert_close(one, other, rtol=0, atol=0)
    assert_close(gradients(one, leaves), gradients(other, leaves), rtol=0, atol=0)


@pytest.mark.parametrize("counts", [COUNTS, [0, 0], [14, 1]], ids=str)
def test_a_matcher_of_pairs_gives_the_same(counts):
    outputs, targets, leaves = layers_of(counts, 9)
    matcher = ListMatcher()
    theirs, ours = with_matcher(matcher)(outputs, targets), build(9)(outputs, targets)
    assert matcher.calls == 3
    assert_close(theirs, ours)
    assert_close(gradients(theirs, leaves), gradients(ours, leaves))


def test_a_subclass_that_overrides_forward_alone_is_obeyed():
    outputs, targets, _ = layers_of(COUNTS, 9, layers=1)
    for matcher in (FirstQueries(), HungarianMatcher()):
        matcher.forward = FirstQueries.forward.__get__(matcher)  # once more, on the instance
        losses = with_matcher(matcher)(outputs, targets)
        found = torch.full((1, 3, 12), -1)
        for image, n in enumerate(COUNTS):
            found[0, image, :n] = torch.arange(n)
        expected = set_loss(
            [outputs["pred_logits"]], [outputs["pred_boxes"]], Targets.from_list(targets), found
        )[0]
        assert_close(losses["loss_bbox"], expected[1])
        assert_close(losses["loss_giou"], expected[2])


@pytest.mark.parametrize("on", ["cpu", "elsewhere"])
def test_a_matcher_that_gives_a_query_twice_is_named(on, monkeypatch):
    """By its own ``forward``, although it inherits a ``match`` for all layers."""
    outputs, targets, _ = layers_of(COUNTS, 9, layers=1)
    outputs["pred_logits"] = outputs["pred_logits"][..., :9].detach()
    with torch.no_grad():  # every target takes the one good query
        outputs["pred_boxes"][:] = 0.9
        outputs["pred_boxes"][:, 4] = torch.tensor([0.5, 0.5, 0.2, 0.2])
    criterion = with_matcher(dino.SimpleMinsumMatcher(**COSTS), class_loss=ClassLoss("focal"))
    if on == "cpu":
        with pytest.raises(ValueError, match="image 0: the matcher gives one query several targ"):
            criterion(outputs, targets)
    else:  # where nobody looks, the losses tell
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
        assert criterion(outputs, targets)["loss_bbox"].isnan()


def test_what_no_loss_asks_for_has_no_gradient():
    outputs, targets, _ = layers_of(COUNTS, 9, layers=1)
    for losses, without in ((["labels"], "pred_boxes"), (["boxes"], "pred_logits")):
        values = [outputs[name] for name in ("pred_logits", "pred_boxes")]
        found = build(9, losses=[*losses, "cardinality"])(outputs, targets)
        total = sum(value for name, value in found.items() if name.startswith("loss_"))
        grads = torch.autograd.grad(total, values, allow_unused=True)
        assert [g is None for g in grads] == [n == without for n in ("pred_logits", "pred_boxes")]


def test_a_loss_that_is_called_by_another_has_its_gradient():
    class Twice(SetCriterion):
        def loss_twice(self, outputs, targets, indices, num_boxes):
            values = self.loss_boxes(outputs, targets, indices, num_boxes)
            return {"loss_twice": 2 * values["loss_giou"]}

    outputs, targets, leaves = layers_of(COUNTS, 9, layers=1)
    ours = build(9, Twice, ["twice"])(outputs, targets)["loss_twice"]
    theirs = 2 * build(9)(outputs, targets)["loss_giou"]
    assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, leaves, allow_unused=True)[1] for loss in (ours, theirs)]
    assert_close(*grads)


def test_masks_are_a_loss_of_the_last_layer_which_sees_all_outputs():
    seen = []

    class Masks(SetCriterion):
        def loss_masks(self, outputs, targets, indices, num_boxes):
            seen.append(outputs)
            return {"loss_mask": outputs["pred_boxes"].sum()}

    outputs, targets, _ = layers_of(COUNTS, 9)
    losses = build(9, Masks, ["labels", "masks"])(outputs, targets)
    assert [name for name in losses if "mask" in name] == ["loss_mask"]
    assert seen == [outputs]


@pytest.mark.parametrize("class_loss", [ClassLoss("focal"), VARIFOCAL], ids=lambda loss: loss.kind)
def test_losses_of_the_sigmoid(class_loss):
    outputs, targets, leaves = layers_of(COUNTS, 8)  # 9 columns: no column is no-object
    criterion = with_matcher(deformable_detr.HungarianMatcher(**COSTS), class_loss=class_loss)
    assert not criterion.state_dict()
    losses = criterion(outputs, targets)
    name = "loss_vfl" if class_loss is VARIFOCAL else "loss_ce"
    assert {name, f"{name}_0", f"{name}_1"} < losses.keys()
    layers = [outputs, *outputs["aux_outputs"]]
    packed = Targets.from_list(targets)
    match = criterion.matcher.match(layers, packed)
    logits, boxes = ([layer[n] for layer in layers] for n in ("pred_logits", "pred_boxes"))
    expected = set_loss(logits, boxes, packed, match, class_loss=class_loss)
    for row, suffix in zip(expected, ("", "_0", "_1"), strict=True):
        found = [losses[n + suffix] for n in (name, "loss_bbox", "loss_giou", "cardinality_error")]
        assert_close(torch.stack(found), row[:4])
    total = sum(losses[n] for n in losses if n.startswith("loss_"))
    ours = torch.autograd.grad(total, leaves)
    assert_close(ours, torch.autograd.grad(expected[:, :3].sum(), leaves))


def test_a_match_that_fails_makes_its_layer_nan_where_nothing_is_raised():
    outputs, targets, _ = layers_of(COUNTS, 9)
    fine = build(9)(outputs, targets)
    with torch.no_grad():
        outputs["aux_outputs"][0]["pred_boxes"][0, 5] = torch.nan
    criterion = with_matcher(HungarianMatcher(**COSTS), raise_non_finite=False)
    losses = criterion(outputs, targets)
    bad = {name for name, value in losses.items() if not value.isfinite()}
    assert bad == {"loss_ce_0", "loss_bbox_0", "loss_giou_0"}
    assert_close({n: losses[n] for n in losses if n[-2:] != "_0"},
                 {n: fine[n] for n in fine if n[-2:] != "_0"})  # fmt: skip


def test_get_loss_of_a_subclass_is_asked_for_every_loss():
    asked = []

    class Asking(SetCriterion):
        def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
            asked.append((loss, kwargs))
            return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)

    outputs, targets, leaves = layers_of(COUNTS, 9, layers=2)
    ours, theirs = build(9)(outputs, targets), build(9, Asking)(outputs, targets)
    quiet = {"log": False}
    assert asked == [("labels", {}), ("boxes", {}), ("cardinality", {}),
                     ("labels", quiet), ("boxes", {}), ("cardinality", {})]  # fmt: skip
    assert_close(theirs, ours)
    assert_close(gradients(theirs, leaves), gradients(ours, leaves))


def test_a_loss_replaced_on_the_instance_is_called():
    outputs, targets, _ = layers_of(COUNTS, 9, layers=1)
    criterion = build(9)
    criterion.loss_cardinality = lambda *_: {"cardinality_error": torch.tensor(7.0)}
    assert criterion(outputs, targets)["cardinality_error"] == 7


def test_a_loss_sees_device_indices_and_the_number_of_boxes():
    seen = []

    class Looking(SetCriterion):
        def loss_look(self, outputs, targets, indices, num_boxes):
            seen.append((indices, num_boxes))
            return {}

    outputs, targets, _ = layers_of(COUNTS, 9)
    build(9, Looking, ["look"])(outputs, Targets.from_list(targets))
    matcher = HungarianMatcher(**COSTS)
    for (indices, num_boxes), layer in zip(seen, [outputs, *outputs["aux_outputs"]], strict=True):
        assert num_boxes == 10
        assert_close(indices, matcher(layer, targets))


def test_the_reference_twins_give_the_same():
    outputs, targets, leaves = layers_of(COUNTS, 9)
    ours = build(9)(outputs, targets)
    with ops.use_reference():
        theirs = build(9)(outputs, targets)
    assert_close(ours, theirs)
    assert_close(gradients(ours, leaves), gradients(theirs, leaves))


def test_compiles_in_one_graph_for_all_counts():
    torch.compiler.reset()
    criterion = build(9)

    def total(outputs, targets):
        return weighted_losses(criterion(outputs, targets), loss_weights(3))

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for counts in ([7, 3], [2, 5], [0, 1]):
        outputs, targets, leaves = layers_of(counts, 9)
        packed = Targets.from_list(targets)
        with torch._dynamo.config.patch(error_on_recompile=counts != [7, 3]):
            loss, terms = compiled(outputs, packed)
        expected, of_terms = total(outputs, packed)
        assert_close(loss, expected)
        assert_close(terms, of_terms)
        ours, theirs = (torch.autograd.grad(value, leaves) for value in (loss, expected))
        assert_close(ours, theirs)


def test_the_number_of_ops_depends_neither_on_images_nor_on_layers(meta):
    counts = []
    for images, layers in ((1, 1), (4, 2), (16, 6)):
        logits = torch.randn(layers, images, 10, 10, device=meta, requires_grad=True)
        boxes = torch.rand(layers, images, 10, 4, device=meta, requires_grad=True)
        target = {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}
        targets = Targets.from_list([target] * images).to(meta)
        criterion = SetCriterion(9, HungarianMatcher(), loss_weights(layers), EOS, LOSSES)
        criterion = criterion.to(meta)

        def step(logits=logits, boxes=boxes, targets=targets, criterion=criterion):
            named = [
                {"pred_logits": x, "pred_boxes": b}
                for x, b in zip(unbind_layers(logits), unbind_layers(boxes), strict=True)
            ]
            losses = criterion({**named[-1], "aux_outputs": named[:-1]}, targets)
            weighted_losses(losses, criterion.weight_dict)[0].backward()

        for _ in range(2):
            names = dispatched(step)
        counts.append(len(names))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] <= 30
    assert names.count("detr_fast.hungarian_match.default") == 1
    assert names.count("detr_fast.set_loss.default") == 1
    assert names.count("aten.stack.default") == 3  # of scalars; none of logits or boxes
