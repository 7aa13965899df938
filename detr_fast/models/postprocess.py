# SPDX-License-Identifier: Apache-2.0
"""From the outputs of the model to detections in pixels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.reference.boxes import box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Makes a detection of every query: its best class but no-object, its box in pixels."""

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Score, label and scale the predictions of a batch.

        Args:
            outputs (Mapping): ``"pred_logits"`` (Tensor[B, Q, C], the last column no-object) and
                ``"pred_boxes"`` (Tensor[B, Q, 4], ``(cx, cy, w, h)`` in [0, 1]).
            target_sizes (Tensor[B, 2]): height and width of the image that the boxes shall refer
                to: before resizing for COCO evaluation, after it for drawing on the input.

        Returns:
            list[dict[str, Tensor]]: for each image ``"scores"`` (Q,), ``"labels"`` (Q,) int64 and
            ``"boxes"`` (Q, 4), corners ``(x0, y0, x1, y1)`` in pixels; floats are float32.

        Raises:
            ValueError: if shapes do not fit.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        if logits.dim() != 3 or logits.shape[2] < 2 or boxes.shape != (*logits.shape[:2], 4):
            raise ValueError(
                "expected pred_logits (B, Q, C) with C >= 2 and pred_boxes (B, Q, 4), "
                f"got {tuple(logits.shape)} and {tuple(boxes.shape)}"
            )
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(
                f"target_sizes: expected (height, width) of {len(logits)} images, shape "
                f"({len(logits)}, 2), got {tuple(target_sizes.shape)}"
            )
        scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.to(boxes.device).unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)
        corners = box_cxcywh_to_xyxy(boxes.float()) * scale[:, None]
        return [
            {"scores": s, "labels": label, "boxes": b}
            for s, label, b in zip(scores, labels, corners, strict=True)
        ]
