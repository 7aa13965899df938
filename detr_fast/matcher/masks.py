# SPDX-License-Identifier: Apache-2.0
"""Costs of masks that are compared at sampled points (Cheng et al., Mask2Former, CVPR 2022)."""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, softplus


def sample_points(
    masks: Tensor, points: Tensor, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """Values of masks at points.

    Args:
        masks (Tensor[N, H, W]): floating masks.
        points (Tensor[1, P, 2]): ``(x, y)`` in [0, 1], the same for all masks.
        mode (str): ``"bilinear"`` or ``"nearest"``.
        padding_mode (str): ``"zeros"`` or ``"border"``.

    Returns:
        Tensor[N, P]: the values.
    """
    grid = (2.0 * points - 1.0).to(masks.dtype)[:, None]
    # the masks as channels of one image: its interpolation weights are found once for all
    found = grid_sample(
        masks[None], grid, mode=mode, padding_mode=padding_mode, align_corners=False
    )
    return found[0, :, 0]


def mask_costs(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of every prediction and target.

    Computed in float32, also under autocast.

    Args:
        logits (Tensor[Q, P]): predictions before the sigmoid.
        masks (Tensor[n, P]): targets in [0, 1].

    Returns:
        tuple[Tensor[Q, n], Tensor[Q, n]]: float32; the dice loss counts 1 to both of its sides.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, masks = logits.float(), masks.float()
        # of a target t the cross-entropy is softplus(x) - t x
        entropy = softplus(logits).sum(-1, keepdim=True) - logits @ masks.T
        probability = logits.sigmoid()
        total = probability.sum(-1, keepdim=True) + masks.sum(-1)
        dice = 1 - (2 * (probability @ masks.T) + 1) / (total + 1)
        return entropy / max(1, logits.shape[1]), dice
