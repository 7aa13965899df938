# SPDX-License-Identifier: Apache-2.0
"""How DETR's weights are updated: AdamW with two learning rates, divided by 10 at times."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from detr_fast.config import Config, UsageError
from detr_fast.engine.loss_scale import LossScale


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    lr_backbone: float,
    weight_decay: float,
    fused: bool | None = True,
) -> AdamW:
    """AdamW over the trainable parameters; those of the backbone learn at a rate of their own.

    The groups, and the order of the parameters in them, are those of facebookresearch/detr: its
    checkpoints hold optimizer states that fit. The fused kernels also leave out an update on the
    word of the device (``found_inf``). With ``fused=None`` torch chooses, as in the original.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in parameters if "backbone" not in name]},
        {"params": [p for name, p in parameters if "backbone" in name], "lr": lr_backbone},
    ]
    return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused)


def build_schedule(optimizer: AdamW, lr_drop: int) -> StepLR:
    """Divides the learning rates by 10 every ``lr_drop`` epochs."""
    return StepLR(optimizer, lr_drop, gamma=0.1)


def freeze(model: nn.Module, beginnings: str) -> None:
    """Let parameters not learn.

    Args:
        model (nn.Module): the model.
        beginnings (str): of their names, with commas between, e.g. ``backbone,query_embed``.

    Raises:
        UsageError: if one of them fits no parameter, or none is left to learn.
    """
    for beginning in filter(None, beginnings.split(",")):
        named = [(n, p) for n, p in model.named_parameters() if f"{n}.".startswith(f"{beginning}.")]
        if not named:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UsageError(f"--freeze {beginning}: no such part; the model has {parts}")
        for _, parameter in named:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--freeze {beginnings}: nothing is left to learn")


def training_mode(model: nn.Module) -> None:
    """Set the model to training, and what is frozen to evaluation: its statistics stay, too."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


class RunningStatistics:
    """What batch norm has seen: it can forget the batches of an update that is left out.

    A forward pass changes it before any loss tells whether the activations were finite, and one
    NaN would stay in a running mean for good.

    Args:
        model (nn.Module): the model.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._now = [buffer for norm in norms for buffer in norm.buffers()]
        self._good = [buffer.clone() for buffer in self._now]

    def settle(self, good: Tensor) -> None:
        """Keep what the last batches have changed if ``good`` (0-dim, bool), or else undo it."""
        for now, before in zip(self._now, self._good, strict=True):
            torch.where(good, now, before, out=now)
        if self._now:
            torch._foreach_copy_(self._good, self._now)


class MovingAverage:
    """A model whose weights follow another's; nothing of it waits for the device.

    Args:
        model (nn.Module): what is followed.
        decay (float): what stays of the average at an update, at most.

    Attributes:
        module (nn.Module): the average, a model of the same kind.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(model), decay
        self._averages: list[Tensor] = list(self.module.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        self._copies, self._buffers = list(self.module.buffers()), list(model.buffers())

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Move towards the model; buffers are copied.

        Args:
            updates (int): how many there were before. The memory is short at first, or the start
                would weigh for thousands of them.
        """
        decay = min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)


class Learner:
    """Turns losses into new weights, without waiting for the device.

    Per update: gradients of ``--accumulate_steps`` batches are averaged, their norm is clipped,
    the learning rates rise over the first ``--warmup_steps`` updates, AdamW steps, and the moving
    average of the weights follows (``--ema_decay``; Polyak and Juditsky 1992).

    An update whose losses or gradient are not finite is left out: weights, moments, their step
    counts and the statistics of batch norm stay as they were before its batches. Only the device
    knows; what the host counts (`steps`, and with it warm-up and the memory of the average) goes
    on.

    Gradients of float16 are those of a scaled loss (`LossScale`), until the update. One that
    overflows is left out like any other that is not finite.

    Args:
        model (nn.Module): what learns, on its device and with its weights.
        config (Config): the flags.
        scaled (bool): scale the loss: for products in float16.
        static_gradients (bool): gradients are the same tensors for the whole run, as a CUDA graph
            of a backward pass needs it; the default frees their memory between updates and spares
            a pass that adds.

    Attributes:
        steps (int): updates so far, with those that were left out.
        rate (float): learning rate of the last update (all but the backbone).
        updated (bool): whether the batch in hand ends with an update; between updates there are
            gradients that no checkpoint holds.
        scale (LossScale | None): of the loss.
        norm (Tensor): 0-dim on the device, the norm of the last update's gradient before clipping.
        skipped (Tensor): 0-dim on the device, 1 if the last update was left out, or else 0.
    """

    norm: Tensor
    skipped: Tensor
    _scaled_by: Tensor
    fused: bool | None = True  # of `build_optimizer`

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        scaled: bool = False,
        static_gradients: bool = False,
    ) -> None:
        self.model, self.config = model, config
        self.optimizer = build_optimizer(
            model,
            lr=config.lr,
            lr_backbone=config.lr_backbone,
            weight_decay=config.weight_decay,
            fused=self.fused,
        )
        self.schedule = build_schedule(self.optimizer, config.lr_drop_epoch)
        self.steps, self.updated = 0, True
        self.rate = config.lr
        self.statistics = RunningStatistics(model)
        self.average = MovingAverage(model, config.ema_decay) if config.ema_decay else None
        device = next(model.parameters()).device
        self.scale = LossScale(device) if scaled else None
        self._share = 1.0  # of the batch in hand in the average of its update
        # by which a loss is multiplied; on the device, so that a CUDA graph reads what is new
        self._factor = torch.ones((), device=device)
        self._losses = torch.zeros((), device=device)  # of the batches of an update, added up
        self._static: list[tuple[nn.Parameter, Tensor]] = []
        if static_gradients:
            learning = [p for p in model.parameters() if p.requires_grad]
            self._static = [(p, torch.zeros_like(p)) for p in learning]
            self._put_gradients_back()

    @property
    def evaluated(self) -> nn.Module:
        """The model whose AP counts: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def begin(self, batch: int, batches: int) -> None:
        """Prepare for batch number ``batch`` of the ``batches`` of an epoch."""
        size = self.config.accumulate_steps
        first = batch - batch % size
        last = min(first + size, batches) - 1
        if batch == first:
            if self._static:
                torch._foreach_zero_([gradient for _, gradient in self._static])
                self._put_gradients_back()
            else:
                self.optimizer.zero_grad()
            self._losses.zero_()
        self._share, self.updated = 1 / (last + 1 - first), batch == last
        if self.scale is None:
            self._factor.fill_(self._share)
        else:
            torch.mul(self.scale.value, self._share, out=self._factor)

    def _put_gradients_back(self) -> None:
        for parameter, gradient in self._static:  # a graph writes nowhere else
            parameter.grad = gradient

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a batch's loss; nothing but work of the device."""
        loss.backward(self._factor)
        self._losses += loss.detach()

    def finish(self) -> None:
        """Update the weights, where the batch is the last one of its update."""
        if self.updated:
            self._update()

    def outcome(self) -> dict[str, Tensor]:
        """What an update adds to the metrics of its batch: see `StepMetrics.add`."""
        values = {"skipped": self.skipped, "gradient_norm": self.norm}
        return values if self.scale is None else {**values, "loss_scale": self._scaled_by}

    def end_epoch(self) -> None:
        """Let the learning rates follow the schedule."""
        with warnings.catch_warnings():
            # a run that goes on between training and evaluation has made no update of its own yet
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()

    def _clip(self) -> None:
        """Clip the gradient, and tell the optimizer whether to leave the update out."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.scale is not None:
            self._scaled_by = self.scale.value.clone()
            torch._foreach_mul_(gradients, self._scaled_by.reciprocal())
        self.norm = nn.utils.get_total_norm(gradients)
        if self.config.clip_max_norm > 0:
            nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.config.clip_max_norm, self.norm
            )
        good = (self._losses + self.norm).isfinite()  # only if each of them is
        self.skipped = self.optimizer.found_inf = 1 - good.float()
        if self.scale is not None:
            self.scale.update(1 - self.norm.isfinite().float())

    def _settle(self) -> None:
        """Forget what the batches of an update that was left out have changed."""
        self.statistics.settle(self.skipped == 0)

    @torch.no_grad()
    def _update(self) -> None:
        self._clip()
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        if self.steps < self.config.warmup_steps:
            for group in groups:
                group["lr"] *= (self.steps + 1) / self.config.warmup_steps
        self.rate = groups[0]["lr"]
        self.optimizer.step()
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate
        self._settle()
        if self.average is not None:
            self.average.follow(self.steps)
        self.steps += 1

    def _fit_moments(self) -> None:
        """Lay the moments of a checkpoint out as the weights: the fused kernels ask for it."""
        for parameter, state in self.optimizer.state.items():
            shapes = {state[key].shape for key in ("exp_avg", "exp_avg_sq")}
            if shapes != {parameter.shape}:
                raise ValueError(f"moments of shape {shapes} for weights of {parameter.shape}")
            for key in ("exp_avg", "exp_avg_sq"):
                if state[key].stride() != parameter.stride():
                    state[key] = torch.empty_like(parameter).copy_(state[key])

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint; the names are those of facebookresearch/detr."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "steps": self.steps,
            "learning": self._learning(),
        }
        if self.average is not None:
            state["ema"] = self.average.module.state_dict()
        if self.scale is not None:
            state["scaler"] = self.scale.state_dict()
        return state

    def _learning(self) -> list[list[str]]:
        """Names of the parameters of each group of the optimizer."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [[names[id(p)] for p in g["params"]] for g in self.optimizer.param_groups]

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint; rates, drop and decay are nevertheless those of the flags.

        Raises:
            UsageError: if other parameters learn than in the run that wrote it.
        """
        groups, stored = self.optimizer.param_groups, checkpoint["optimizer"]
        ours = self._learning()
        theirs = checkpoint.get("learning", ours)
        sizes = [
            [len(group["params"]) for group in side] for side in (groups, stored["param_groups"])
        ]
        if theirs != ours or sizes[0] != sizes[1]:
            raise UsageError(
                f"--resume: {sum(sizes[0])} parameters learn, in the run before it were "
                f"{sum(sizes[1])}, not all the same: give the same --freeze and --lr_backbone, or "
                "start anew with --finetune"
            )
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": stored["state"], "param_groups": own})
        self._fit_moments()
        drops = checkpoint["lr_scheduler"]
        last = drops["last_epoch"]
        for group, before in zip(self.optimizer.param_groups, stored["param_groups"], strict=True):
            rate = (group["initial_lr"], self.schedule.step_size)
            if rate == (before.get("initial_lr"), drops.get("step_size")):
                group["lr"] = before["lr"]  # to the bit
            else:
                group["lr"] = rate[0] * 0.1 ** (last // rate[1])
        self.schedule.last_epoch, self.schedule._step_count = last, last + 1
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = checkpoint.get("steps", 0)
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
        if self.scale is not None:
            self.scale.load_state_dict(checkpoint.get("scaler", {}))
