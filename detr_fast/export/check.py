# SPDX-License-Identifier: Apache-2.0
"""Whether an exported file says what the model says."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.export.files import Run
from detr_fast.export.program import Deployed
from detr_fast.reference.boxes import box_cxcywh_to_xyxy

TOLERANCE = 1e-3  # of probabilities, logits and shares of the image
SIZES = ((192, 256), (256, 192), (224, 224), (131, 197), (320, 416))
BATCHES = (1, 2, 7)


class Difference(NamedTuple):
    """The largest difference of a batch."""

    batch: int
    height: int
    width: int
    values: float  # of scores or logits
    boxes: float

    @property
    def equal(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.values <= TOLERANCE and self.boxes <= TOLERANCE


@torch.no_grad()
def differences(
    deployed: Deployed,
    run: Run,
    padding: bool,
    sizes: Sequence[tuple[int, int]] = SIZES,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Difference]:
    """Compare the outputs for every size and every number of images.

    Args:
        deployed (Deployed): the model.
        run (Callable): the file, by `detr_fast.export.files.load`.
        padding (bool): whether the file takes ``sizes``.
        sizes (Sequence): (height, width) in pixels.
        batches (Sequence[int]): numbers of images.
    """
    for height, width in sizes:
        for batch in batches:
            inputs = deployed.inputs(batch, height, width, padding)
            found = [value.cpu() for value in run(*inputs)]
            logits, boxes = (value.cpu() for value in deployed.predictions(*inputs))
            if deployed.raw:
                values = _difference(found[0], logits)
            else:
                probabilities = logits.softmax(-1)
                best = _difference(found[0], probabilities[..., :-1].amax(-1))
                # of two classes that are as probable either may be the label
                labelled = probabilities.gather(2, found[1][..., None])[..., 0]
                values = torch.maximum(best, _difference(found[0], labelled))
                boxes = box_cxcywh_to_xyxy(boxes)
            of_boxes = _difference(found[-1], boxes)
            yield Difference(batch, height, width, float(values), float(of_boxes))


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return torch.tensor(float("inf"))
    return (found - expected).abs().max()
