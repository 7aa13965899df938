# SPDX-License-Identifier: Apache-2.0
"""The matchers of transformers: the originals and ours on the same inputs."""

import argparse
from importlib import import_module

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher import patch
from detr_fast.matcher import transformers as ours
from tests.matcher.published import random_batch

pytest.importorskip("scipy")
transformers = pytest.importorskip("transformers")

CONFIG = argparse.Namespace(
    matcher_class_cost=2.0,
    matcher_bbox_cost=5.0,
    matcher_giou_cost=2.0,
    matcher_alpha=0.3,
    matcher_gamma=1.5,
    use_focal_loss=True,
)
SOFTMAX_CONFIG = argparse.Namespace(**{**vars(CONFIG), "use_focal_loss": False})
WEIGHTS = {"class_cost": 2, "bbox_cost": 5, "giou_cost": 2}
MATCHERS = {
    "DETR": ("loss_for_object_detection", "HungarianMatcher", WEIGHTS, {}),
    "DETR, defaults": ("loss_for_object_detection", "HungarianMatcher", {}, {}),
    "Deformable DETR": ("loss_deformable_detr", "DeformableDetrHungarianMatcher", WEIGHTS, {}),
    "LW-DETR": ("loss_lw_detr", "LwDetrHungarianMatcher", WEIGHTS, {"group_detr": 1}),
    "LW-DETR, groups": ("loss_lw_detr", "LwDetrHungarianMatcher", WEIGHTS, {"group_detr": 4}),
    "RT-DETR": ("loss_rt_detr", "RTDetrHungarianMatcher", {"config": CONFIG}, {}),
    "RT-DETR, softmax": ("loss_rt_detr", "RTDetrHungarianMatcher", {"config": SOFTMAX_CONFIG}, {}),
    "D-FINE": ("loss_d_fine", "RTDetrHungarianMatcher", {"config": CONFIG}, {}),
    "Grounding DINO": ("loss_grounding_dino", "GroundingDinoHungarianMatcher", WEIGHTS, {}),
    "RF-DETR": (
        "loss_rf_detr",
        "RfDetrHungarianMatcher",
        {**WEIGHTS, "mask_point_sample_ratio": 4, "cost_mask_dice_cost": 3},
        {"group_detr": 2},
    ),
}


def batch(counts, queries, seed=0):
    """With what all of the matchers read: class names of several tokens, and masks."""
    outputs, targets = random_batch(counts, queries, 9, seed)
    g = torch.Generator().manual_seed(seed)
    outputs["logits"] = outputs.pop("pred_logits")
    outputs["pred_masks"] = torch.randn(len(counts), queries, 6, 8, generator=g)
    outputs["label_maps"] = tuple(
        (torch.rand(9, 10, generator=g) < 0.3).float().index_fill(1, torch.tensor([0]), 1.0)
        for _ in counts
    )
    for target in targets:
        target["class_labels"] = target.pop("labels")
        n = len(target["boxes"])
        target["masks"] = (torch.rand(n, 24, 32, generator=g) < 0.5).float()
    return outputs, targets


def both(name, outputs, targets):
    """Pairs of the original and of ours, with the same random points."""
    module, cls, options, arguments = MATCHERS[name]
    original = getattr(import_module(f"transformers.loss.{module}"), cls)(**options)
    torch.manual_seed(0)
    expected = original(outputs, targets, **arguments)
    torch.manual_seed(0)
    found = getattr(ours, cls)(**options)(outputs, targets, **arguments)
    for pair in found:
        assert type(pair) is tuple
        assert [i.dtype for i in pair] == [torch.int64] * 2
        assert [i.device.type for i in pair] == ["cpu"] * 2
    return found, expected


@pytest.mark.parametrize("counts", [[7, 3], [20, 0, 50, 1], [0, 0], [1]], ids=str)
@pytest.mark.parametrize("name", MATCHERS)
def test_equals_the_original(name, counts):
    for seed in range(3):
        found, expected = both(name, *batch(counts, 40, seed))
        assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MATCHERS)
def test_costs_that_are_not_finite_count_most(name):
    for seed in range(5):
        outputs, targets = batch([7, 30], 40, seed)
        outputs["logits"][0, ::3] = torch.nan
        outputs["logits"][1, 5] = torch.inf
        found, expected = both(name, outputs, targets)
        assert_close(found, expected)


def test_grounding_dino_is_matched_in_float32_under_autocast(monkeypatch):
    extra = []
    monkeypatch.setattr(ours, "match_layers", lambda *_, extra_cost, **__: extra_cost)
    matcher = ours.GroundingDinoHungarianMatcher(**WEIGHTS)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            extra.append(matcher(*batch([7, 30], 40)))
    assert_close(extra[1], extra[0], rtol=0, atol=0)


MASKS = {
    "mask2former": "Mask2FormerHungarianMatcher",
    "oneformer": "OneFormerHungarianMatcher",
    "eomt": "EomtHungarianMatcher",
    "eomt_dinov3": "EomtDinov3HungarianMatcher",
    "videomt": "VideomtHungarianMatcher",
}


@pytest.mark.parametrize("counts", [[3, 1], [12, 0, 30]], ids=str)
@pytest.mark.parametrize("model", MASKS)
def test_matchers_of_masks_equal_the_originals(model, counts):
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    original = getattr(module, MASKS[model])
    outputs, targets = batch(counts, 20)
    arguments = (
        outputs["pred_masks"],
        outputs["logits"],
        [t["masks"] for t in targets],
        [t["class_labels"] for t in targets],
    )
    for seed in range(3):
        weights = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0, "num_points": 112}
        torch.manual_seed(seed)
        expected = original(**weights)(*arguments)
        torch.manual_seed(seed)
        found = ours.Mask2FormerHungarianMatcher(**weights)(*arguments)
        assert_close(found, expected, rtol=0, atol=0)
    defaults = vars(original()), vars(ours.Mask2FormerHungarianMatcher())
    assert defaults[0] == defaults[1]  # patch() hands theirs to our method


@pytest.mark.parametrize("auxiliary", [False, True])
def test_detr_has_the_same_loss_under_the_patch(auxiliary):
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            out_features=["stage4"],
        ),
        d_model=16,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=20,
        num_labels=9,
        auxiliary_loss=auxiliary,
    )
    model = transformers.DetrForObjectDetection(config).eval()
    for parameter in model.parameters():  # as initialised, all queries predict nearly the same
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0)
    _, targets = batch([5, 0, 12], 20)
    labels = [{key: target[key] for key in ("class_labels", "boxes")} for target in targets]
    pixels = torch.randn(3, 3, 64, 64)
    expected = model(pixels, labels=labels)
    with patch("transformers") as patched:
        assert "HungarianMatcher.forward" in repr(patched)
        found = model(pixels, labels=labels)
    assert_close(found.loss, expected.loss, rtol=0, atol=0)
    assert_close(found.loss_dict, expected.loss_dict, rtol=0, atol=0)
    assert len(found.loss_dict) == (12 if auxiliary else 4)
