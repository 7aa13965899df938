# SPDX-License-Identifier: Apache-2.0
"""How DETR's weights are updated: AdamW with two learning rates, divided by 10 at times."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

from detr_fast.config import Config, UsageError


def build_optimizer(
    model: nn.Module, *, lr: float, lr_backbone: float, weight_decay: float
) -> AdamW:
    """AdamW over the trainable parameters; those of the backbone learn at a rate of their own.

    The groups, and the order of the parameters in them, are those of facebookresearch/detr: its
    checkpoints hold optimizer states that fit.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in parameters if "backbone" not in name]},
        {"params": [p for name, p in parameters if "backbone" in name], "lr": lr_backbone},
    ]
    return AdamW(groups, lr=lr, weight_decay=weight_decay)


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


class Learner:
    """Turns losses into new weights.

    Per update: gradients of ``--accumulate_steps`` batches are averaged, their norm is clipped,
    the learning rates rise over the first ``--warmup_steps`` updates, AdamW steps, and the moving
    average of the weights follows (``--ema_decay``; Polyak and Juditsky 1992).

    Args:
        model (nn.Module): what learns.
        config (Config): the flags.

    Attributes:
        steps (int): updates so far.
        rate (float): learning rate of the last update (all but the backbone).
        updated (bool): whether the last `learn` ended with an update; between updates there are
            gradients that no checkpoint holds.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.config = model, config
        self.optimizer = build_optimizer(
            model, lr=config.lr, lr_backbone=config.lr_backbone, weight_decay=config.weight_decay
        )
        self.schedule = build_schedule(self.optimizer, config.lr_drop_epoch)
        self.steps, self.updated = 0, True
        self.rate = config.lr
        self.average: AveragedModel | None = None
        if config.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=self._follow)

    @property
    def evaluated(self) -> nn.Module:
        """The model whose AP counts: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def learn(self, loss: Tensor, batch: int, batches: int) -> None:
        """Take in the loss of batch number ``batch`` of the ``batches`` of an epoch."""
        size = self.config.accumulate_steps
        first = batch - batch % size
        last = min(first + size, batches) - 1
        if batch == first:
            self.optimizer.zero_grad()
        (loss / (last + 1 - first)).backward()
        self.updated = batch == last
        if self.updated:
            self._update()

    def end_epoch(self) -> None:
        """Let the learning rates follow the schedule."""
        with warnings.catch_warnings():
            # a run that goes on between training and evaluation has made no update of its own yet
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()

    def _update(self) -> None:
        if self.config.clip_max_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_max_norm)
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        if self.steps < self.config.warmup_steps:
            for group in groups:
                group["lr"] *= (self.steps + 1) / self.config.warmup_steps
        self.rate = groups[0]["lr"]
        self.optimizer.step()
        for group, rate in zip(groups, scheduled, strict=True):
            group["lr"] = rate
        self.steps += 1
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _follow(self, averages: Any, weights: Any, updates: Any) -> None:
        # a short memory at first, or the start would weigh for thousands of updates
        decay = min(self.config.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _check_moments(self) -> None:
        for parameter, state in self.optimizer.state.items():
            shapes = {state[key].shape for key in ("exp_avg", "exp_avg_sq")}
            if shapes != {parameter.shape}:
                raise ValueError(f"moments of shape {shapes} for weights of {parameter.shape}")

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
        self._check_moments()
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
            self.average.n_averaged.fill_(self.steps)
