# SPDX-License-Identifier: Apache-2.0
"""What was found in one image, in the forms that others take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import supervision


@dataclass(eq=False)
class Detections:
    """The objects of one image, best first.

    Fields that `supervision.Detections` has, too, bear its names.

    Attributes:
        xyxy (ndarray[N, 4]): float32, corners in pixels of the upright image.
        confidence (ndarray[N]): float32, scores in [0, 1].
        class_id (ndarray[N]): int64, labels.
        data (dict): ``"class_name"`` (ndarray[N] of str); with attention asked for also
            ``"attention"`` (ndarray[N, h, w] of float32): how much of the attention of the last
            decoder layer goes to each cell of the feature grid, the mean over its heads.
        size (tuple[int, int]): height and width of the image.
        source (str): name of the image: its path, ``clip.mp4#12``, or its place in a list.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    data: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)
    source: str = ""

    def __len__(self) -> int:
        """How many objects there are."""
        return len(self.xyxy)

    def to_supervision(self) -> supervision.Detections:
        """As `supervision.Detections`, for its annotators, trackers and zones.

        Raises:
            ImportError: if supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                'supervision is not installed: pip install "detr-fast[supervision]"'
            ) from error
        return supervision.Detections(
            xyxy=self.xyxy, confidence=self.confidence, class_id=self.class_id, data=dict(self.data)
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain numbers, ready for JSON: box, score, label and name of each object."""
        names = self.data["class_name"].tolist()
        columns = (self.xyxy.tolist(), self.confidence.tolist(), self.class_id.tolist(), names)
        return [
            {"box": box, "score": score, "label": label, "name": name}
            for box, score, label, name in zip(*columns, strict=True)
        ]

    def to_coco(
        self, image_id: int, category_ids: Mapping[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """In COCO's results format: boxes are x, y, width and height.

        Args:
            image_id (int): of the image.
            category_ids (dict[int, int], optional): label -> category id, which leave out objects
                of other labels; default: the labels.
        """
        boxes = self.xyxy.copy()
        boxes[:, 2:] -= boxes[:, :2]
        columns = (boxes.tolist(), self.confidence.tolist(), self.class_id.tolist())
        return [
            {
                "image_id": image_id,
                "category_id": label if category_ids is None else category_ids[label],
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(*columns, strict=True)
            if category_ids is None or label in category_ids
        ]
