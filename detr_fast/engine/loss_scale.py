# SPDX-License-Identifier: Apache-2.0
"""The factor that keeps gradients of float16 in its range."""

import math
from typing import Any

import torch
from torch import Tensor


class LossScale:
    """A factor of the loss that falls when a gradient overflows, and rises when long none did.

    The rule, its numbers and the kernel are those of ``torch.amp.GradScaler`` (Micikevicius et al.,
    ICLR 2018). The class is not, as it decides by itself which updates are left out, by gradients
    alone, and makes its tensors with the first loss: these here exist before a CUDA graph is
    recorded, and are written in place.

    Args:
        device (torch.device): of the losses.

    Attributes:
        value (Tensor): 0-dim float32 on the device.
        good (Tensor): 0-dim int32 on the device, updates in a row without overflow.
    """

    start, growth, backoff, interval = 2.0**16, 2.0, 0.5, 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), self.start, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Follow an update, without waiting for the device.

        Args:
            overflow (Tensor): 0-dim float32, not 0 where the gradient was not finite.
        """
        torch._amp_update_scale_(
            self.value, self.good, overflow, self.growth, self.backoff, self.interval
        )

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint, in the form of ``GradScaler``; waits for the device."""
        return {
            "scale": self.value.item(),
            "growth_factor": self.growth,
            "backoff_factor": self.backoff,
            "growth_interval": self.interval,
            "_growth_tracker": self.good.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; one without a scale (of another ``--amp``) changes nothing.

        Raises:
            ValueError: if the scale is no positive number.
        """
        if "scale" not in state:
            return
        scale, good = float(state["scale"]), int(state.get("_growth_tracker", 0))
        if not (math.isfinite(scale) and scale > 0 and good >= 0):
            raise ValueError(f"a loss scale of {scale} after {good} good updates")
        self.value.fill_(scale)
        self.good.fill_(good)
