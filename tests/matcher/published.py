# SPDX-License-Identifier: Apache-2.0
"""The published matching, restated: one matrix for the whole batch, split by image, scipy."""

import torch


def corners(boxes):
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def giou_matrix(boxes1, boxes2):
    """GIoU of all pairs of corner boxes, clamped as published."""
    area1 = (boxes1[:, 2] - boxes1[:, 0]) * (boxes1[:, 3] - boxes1[:, 1])
    area2 = (boxes2[:, 2] - boxes2[:, 0]) * (boxes2[:, 3] - boxes2[:, 1])
    shared = torch.min(boxes1[:, None, 2:], boxes2[:, 2:]) - torch.max(
        boxes1[:, None, :2], boxes2[:, :2]
    )
    shared = shared.clamp(min=0).prod(2)
    union = area1[:, None] + area2 - shared
    hull = torch.max(boxes1[:, None, 2:], boxes2[:, 2:]) - torch.min(
        boxes1[:, None, :2], boxes2[:, :2]
    )
    hull = hull.clamp(min=0).prod(2)
    return shared / union - (hull - union) / hull


@torch.no_grad()
def published_match(outputs, targets, cost_class, cost_bbox, cost_giou):
    from scipy.optimize import linear_sum_assignment

    batch, queries = outputs["pred_logits"].shape[:2]
    probability = outputs["pred_logits"].flatten(0, 1).softmax(-1)
    boxes = outputs["pred_boxes"].flatten(0, 1)
    labels = torch.cat([t["labels"] for t in targets])
    target_boxes = torch.cat([t["boxes"] for t in targets])
    cost = (
        cost_bbox * torch.cdist(boxes, target_boxes, p=1)
        + cost_class * -probability[:, labels]
        + cost_giou * -giou_matrix(corners(boxes), corners(target_boxes))
    )
    blocks = cost.view(batch, queries, -1).split([len(t["boxes"]) for t in targets], -1)
    pairs = [linear_sum_assignment(block[image]) for image, block in enumerate(blocks)]
    return [(torch.as_tensor(i), torch.as_tensor(j)) for i, j in pairs]


def random_boxes(*shape, generator, dtype=torch.float32):
    """Boxes (cx, cy, w, h) with sides of 0.02 to 0.52."""
    draw = torch.rand(*shape, 4, generator=generator, dtype=torch.float64)
    return torch.cat([draw[..., :2], 0.02 + draw[..., 2:] / 2], dim=-1).to(dtype)


def random_batch(counts, queries, classes, seed=0, dtype=torch.float32):
    """Outputs of one decoder layer and the targets of ``len(counts)`` images."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), queries, classes + 1, generator=g, dtype=torch.float64)
    outputs = {
        "pred_logits": 2 * logits.to(dtype),
        "pred_boxes": random_boxes(len(counts), queries, generator=g, dtype=dtype),
    }
    targets = [
        {
            "labels": torch.randint(classes, (n,), generator=g),
            "boxes": random_boxes(n, generator=g, dtype=dtype),
        }
        for n in counts
    ]
    return outputs, targets
