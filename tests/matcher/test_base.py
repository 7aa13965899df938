# SPDX-License-Identifier: Apache-2.0
"""What the drop-ins share: several layers in one call, renamed keys, extra costs."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.matcher.base import Keys, match_layers
from detr_fast.matcher.packing import Targets
from detr_fast.ops import ClassCost, CostWeights
from tests.matcher.published import published_cost, published_match, random_batch, solve

pytest.importorskip("scipy")
WEIGHTS, SOFTMAX = CostWeights(1, 5, 2), ClassCost()


def layers(counts, queries):
    """Outputs of one layer for each number of queries, and common targets."""
    several = [random_batch(counts, q, 9, seed)[0] for seed, q in enumerate(queries)]
    return several, random_batch(counts, 5, 9)[1]


def test_matches_layers_of_different_sizes():
    several, targets = layers([7, 0, 12], [20, 10, 30])
    expected = [published_match(outputs, targets, *WEIGHTS) for outputs in several]
    assert_close(match_layers(several, targets, WEIGHTS, SOFTMAX), expected)


def test_reads_renamed_keys():
    (outputs,), targets = layers([7, 3], [20])
    expected = published_match(outputs, targets, *WEIGHTS)
    keys = Keys("x", "b", "classes", "rects")
    renamed = [{"classes": t["labels"], "rects": t["boxes"]} for t in targets]
    outputs = {"x": outputs["pred_logits"], "b": outputs["pred_boxes"]}
    assert_close(match_layers([outputs], renamed, WEIGHTS, SOFTMAX, keys=keys), [expected])
    del renamed[1]["classes"]
    with pytest.raises(ValueError, match=r"targets\[1\] has no 'classes'; it holds rects"):
        match_layers([outputs], renamed, WEIGHTS, SOFTMAX, keys=keys)
    outputs["b"] = outputs["b"][:, :3]
    with pytest.raises(ValueError, match=r"expected x \(B, Q, C\) and b \(B, Q, 4\), got"):
        match_layers([outputs], renamed, WEIGHTS, SOFTMAX, keys=keys)


def test_adds_the_extra_cost_of_each_image():
    several, targets = layers([7, 0, 12], [20, 10])
    g = torch.Generator().manual_seed(0)
    extra, expected = [], []
    for outputs in several:
        queries = outputs["pred_logits"].shape[1]
        extra.append([3 * torch.rand(queries, n, generator=g) for n in (7, 0, 12)])
        cost = published_cost(outputs, targets, *WEIGHTS)
        first = 0
        for image, of_image in enumerate(extra[-1]):
            cost[image, :, first : first + of_image.shape[1]] += of_image
            first += of_image.shape[1]
        expected.append(solve(cost, targets))
    found = match_layers(several, targets, WEIGHTS, SOFTMAX, extra_cost=extra)
    assert_close(found, expected)
    extra[1][2][3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1, image 2: .* extra_cost"):
        match_layers(several, targets, WEIGHTS, SOFTMAX, extra_cost=extra)


def test_names_the_layer():
    several, targets = layers([7, 3], [20, 20])
    several[1]["pred_logits"][1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1, image 1: .*cost_class; pred_logits hold NaN"):
        match_layers(several, targets, WEIGHTS, SOFTMAX)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_boxes_of_targets_may_have_another_dtype(dtype):
    (outputs,), targets = layers([7, 3], [20])
    rounded = [{**t, "boxes": t["boxes"].to(dtype).float()} for t in targets]
    expected = published_match(outputs, rounded, *WEIGHTS)
    given = [{**t, "boxes": t["boxes"].to(dtype)} for t in targets]
    assert_close(match_layers([outputs], given, WEIGHTS, SOFTMAX), [expected])


@pytest.mark.parametrize("key", ["pred_logits", "pred_boxes"])
def test_layers_may_have_different_dtypes(key):
    several, targets = layers([7, 3], [20, 10, 15])
    for outputs, dtype in zip(several, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        outputs[key] = outputs[key].to(dtype)
    as_float = [{name: x.float() for name, x in outputs.items()} for outputs in several]
    expected = [published_match(outputs, targets, *WEIGHTS) for outputs in as_float]
    assert_close(match_layers(several, targets, WEIGHTS, SOFTMAX), expected)


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_refuses_groups_that_are_not_equal(groups):
    several, targets = layers([7, 3], [20])
    with pytest.raises(ValueError, match=f"20 queries cannot be cut into {groups} equal groups"):
        match_layers(several, targets, WEIGHTS, SOFTMAX, groups=groups)


def test_packs_to_widths_that_repeat():
    for n, width in ((0, 8), (1, 8), (8, 8), (9, 16), (33, 64)):
        _, targets = random_batch([n, 0], 5, 9)
        packed = Targets.from_list(targets)
        assert packed.labels.shape == (2, width)
        assert packed.boxes.shape == (2, width, 4)
        assert packed.count.tolist() == [n, 0]
        assert_close(packed.to_list(), targets)
        assert not packed.boxes[0, n:].any()
        assert not packed.labels[1].any()
