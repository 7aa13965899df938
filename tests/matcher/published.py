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


def softmax_cost(logits, labels):
    """DETR: minus the probability, no-object among the columns."""
    return -logits.softmax(-1)[:, labels]


def focal_cost(alpha=0.25, gamma=2.0, eps=1e-8):
    """Deformable DETR: what the focal loss would gain if the query took the class."""

    def cost(logits, labels):
        p = logits.sigmoid()[:, labels]
        hit = alpha * (1 - p) ** gamma * -torch.log(p + eps)
        miss = (1 - alpha) * p**gamma * -torch.log(1 - p + eps)
        return hit - miss

    return cost


def focal_logits_cost(alpha=0.25):
    """RF-DETR: the same of gamma 2, by log-sigmoid."""

    def cost(logits, labels):
        x = logits[:, labels]
        p, log_sigmoid = x.sigmoid(), torch.nn.functional.logsigmoid
        return (1 - alpha) * p**2 * log_sigmoid(-x) - alpha * (1 - p) ** 2 * log_sigmoid(x)

    return cost


@torch.no_grad()
def published_cost(outputs, targets, cost_class, cost_bbox, cost_giou, class_cost=softmax_cost):
    """(B, Q, n of all images): queries against the targets of every image."""
    batch, queries = outputs["pred_logits"].shape[:2]
    boxes = outputs["pred_boxes"].flatten(0, 1)
    labels = torch.cat([t["labels"] for t in targets])
    target_boxes = torch.cat([t["boxes"] for t in targets])
    cost = (
        cost_bbox * torch.cdist(boxes, target_boxes, p=1)
        + cost_class * class_cost(outputs["pred_logits"].flatten(0, 1), labels)
        + cost_giou * -giou_matrix(corners(boxes), corners(target_boxes))
    )
    return cost.view(batch, queries, -1)


def solve(cost, targets, groups=1):
    """(B, Q, n of all images) -> pairs of each image, group after group, by scipy."""
    from scipy.optimize import linear_sum_assignment

    size = cost.shape[1] // groups
    blocks = cost.split([len(t["labels"]) for t in targets], -1)
    pairs = []
    for image, block in enumerate(blocks):
        parts = [linear_sum_assignment(part) for part in block[image].split(size)]
        queries = [torch.as_tensor(i) + size * group for group, (i, _) in enumerate(parts)]
        pairs.append((torch.cat(queries), torch.cat([torch.as_tensor(j) for _, j in parts])))
    return pairs


def published_match(outputs, targets, cost_class, cost_bbox, cost_giou, class_cost=softmax_cost):
    weights = cost_class, cost_bbox, cost_giou
    return solve(published_cost(outputs, targets, *weights, class_cost), targets)


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
