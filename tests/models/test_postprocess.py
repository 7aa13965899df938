# SPDX-License-Identifier: Apache-2.0
"""From outputs to detections."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.models.postprocess import PostProcess


def test_scores_labels_and_boxes_by_hand():
    probability = torch.tensor(
        [[[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]], [[0.25, 0.5, 0.25], [0.05, 0.05, 0.9]]]
    )
    boxes = torch.tensor(
        [
            [[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.25]],
            [[0.5, 0.25, 0.1, 0.5], [0.0, 0.0, 0.5, 0.5]],
        ]
    )
    outputs = {"pred_logits": probability.log(), "pred_boxes": boxes}
    sizes = torch.tensor([[100, 200], [40, 10]])  # height, width
    first, second = PostProcess()(outputs, sizes)
    # the largest of the first and last query is no-object: the best real class is given
    assert_close(first["scores"], torch.tensor([0.2, 0.6]))
    assert_close(second["scores"], torch.tensor([0.5, 0.05]))
    assert first["labels"].tolist() == [1, 0]
    assert second["labels"][0].item() == 1
    assert_close(first["boxes"], torch.tensor([[0.0, 0, 200, 100], [0, 37.5, 100, 62.5]]))
    assert_close(second["boxes"], torch.tensor([[4.5, 0, 5.5, 20], [-2.5, -10, 2.5, 10]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_float32(dtype):
    g = torch.Generator().manual_seed(0)
    half = {
        "pred_logits": torch.randn(1, 9, 5, generator=g).to(dtype),
        "pred_boxes": torch.rand(1, 9, 4, generator=g).to(dtype),
    }
    rounded = {name: value.float() for name, value in half.items()}
    sizes = torch.tensor([[480, 640]])
    assert_close(PostProcess()(half, sizes), PostProcess()(rounded, sizes), rtol=0, atol=0)


def test_gives_no_gradient_and_takes_an_empty_batch():
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    (result,) = PostProcess()(
        {"pred_logits": logits, "pred_boxes": torch.rand(1, 3, 4)}, torch.tensor([[5, 5]])
    )
    assert not result["scores"].requires_grad
    empty = {"pred_logits": torch.zeros(0, 3, 4), "pred_boxes": torch.zeros(0, 3, 4)}
    assert PostProcess()(empty, torch.zeros(0, 2)) == []


@pytest.mark.parametrize(
    ("logits", "boxes", "sizes", "message"),
    [
        ((3, 4), (3, 4), (1, 2), r"got \(3, 4\) and \(3, 4\)"),
        ((2, 3, 1), (2, 3, 4), (2, 2), r"got \(2, 3, 1\)"),
        ((2, 3, 4), (2, 4, 4), (2, 2), r"got \(2, 3, 4\) and \(2, 4, 4\)"),
        ((2, 3, 4), (2, 3, 4), (1, 2), r"of 2 images, shape \(2, 2\), got \(1, 2\)"),
        ((2, 3, 4), (2, 3, 4), (2, 3), r"shape \(2, 2\), got \(2, 3\)"),
    ],
    ids=["flat", "one column", "queries", "too few sizes", "three numbers"],
)
def test_names_shapes_that_do_not_fit(logits, boxes, sizes, message):
    outputs = {"pred_logits": torch.zeros(logits), "pred_boxes": torch.zeros(boxes)}
    with pytest.raises(ValueError, match=message):
        PostProcess()(outputs, torch.ones(sizes))
