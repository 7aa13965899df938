# SPDX-License-Identifier: Apache-2.0
"""An update that is left out is one that never was, and states of other optimizers are taken."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

from detr_fast import cli
from detr_fast.command_line import parse
from detr_fast.config import configure
from detr_fast.criterion import SetCriterion
from detr_fast.engine.optim import Learner
from detr_fast.models import detr_tiny
from detr_fast.models.checkpoint import read_checkpoint, write_checkpoint
from tests.engine import test_train
from tests.engine.test_train import SMALL, STEPS, fit

few_images = test_train.few_images


def learner_of(flags=""):
    torch.manual_seed(0)
    model = detr_tiny(hidden_dim=32, nheads=4, dim_feedforward=32, num_queries=8).train()
    return Learner(model, configure(parse("", "", f"{SMALL} --lr 1e-2 {flags}".split())))


def loss_of(learner, kind, seed):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    if kind == "images":  # the activations, and with them what batch norm sees
        images[1, 0, 5, 5] = torch.nan
    outputs = learner.model(images)
    loss = outputs["pred_logits"].square().mean() + outputs["pred_boxes"].mean()
    if kind == "loss":  # the gradient is finite
        loss = loss + torch.inf
    if kind == "gradient":  # the loss is finite
        loss = loss + (learner.model.class_embed.bias * 0).sqrt().sum()
    return loss


def learn(learner, loss, number, batches):
    learner.begin(number, batches)
    learner.backward(loss)
    learner.finish()


def learned(flags, windows):
    """A learner after windows of batches, each of which ends in an update."""
    learner = learner_of(flags)
    batches = [batch for window in windows for batch in window]
    for number, batch in enumerate(batches):
        learn(learner, loss_of(learner, *batch), number, len(batches))
    return learner


def state_of(learner):
    return {"model": learner.model.state_dict(), **learner.optimizer.state_dict()["state"]}


GOOD = [[("good", 0), ("good", 1)], [("good", 2), ("good", 3)]]


@pytest.mark.parametrize("kind", ["loss", "gradient", "images"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("place", [0, 1])
def test_a_skipped_update_leaves_no_trace(kind, clip, place):
    """Weights, moments, their step counts and batch norm are those of a run without its batches."""
    flags = f"--clip_max_norm {clip} --accumulate_steps 2"
    bad = [("good", 8), ("good", 9)]
    bad[place] = (kind, 8)
    expected = learned(flags, GOOD)
    for windows in ([bad, *GOOD], [GOOD[0], bad, bad, GOOD[1]], [*GOOD, bad]):
        found = learned(flags, windows)
        assert_close(state_of(found), state_of(expected), rtol=0, atol=0)
    assert found.skipped == 1
    assert not (found._losses + found.norm).isfinite()
    assert expected.skipped == 0


def test_what_is_not_skipped_does_leave_a_trace():
    expected = learned("--accumulate_steps 2", GOOD)
    found = learned("--accumulate_steps 2", [*GOOD, GOOD[0]])
    before, after = state_of(expected)["model"], state_of(found)["model"]
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_the_average_stays_finite_and_close():
    expected = learned("--accumulate_steps 2 --ema_decay 0.9", GOOD)
    bad = [("images", 8), ("good", 9)]
    found = learned("--accumulate_steps 2 --ema_decay 0.9", [GOOD[0], bad, GOOD[1], bad])
    averages = (learner.evaluated.state_dict() for learner in (found, expected))
    for (name, value), other in zip(next(averages).items(), next(averages).values(), strict=True):
        assert_close(value, other, rtol=0, atol=0.05, msg=name)


def test_steps_of_any_form_are_loaded():
    """facebookresearch/detr wrote Python ints, later versions of torch tensors on the CPU."""
    start = learned("--accumulate_steps 2", GOOD)
    checkpoint = start.state_dict() | {"model": start.model.state_dict()}
    ends = []
    for form in (int, float, torch.tensor, lambda n: torch.tensor(int(n))):
        stored = copy.deepcopy(checkpoint)
        for entry in stored["optimizer"]["state"].values():
            entry["step"] = form(float(entry["step"]))
        again = learner_of("--accumulate_steps 1")
        again.model.load_state_dict(stored["model"])
        again.load_state_dict(stored)
        learn(again, loss_of(again, "good", 5), 0, 1)
        steps = [entry["step"] for entry in again.optimizer.state.values()]
        assert all(step.dtype == torch.float32 and step == 3 for step in steps)
        ends.append(state_of(again))
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=0, atol=0)


def test_moments_are_laid_out_as_the_weights():
    """The fused kernel walks through memory; a stored moment may lie there in another order."""
    start = learned("--accumulate_steps 2", GOOD)
    checkpoint = copy.deepcopy(start.state_dict())
    for entry in checkpoint["optimizer"]["state"].values():
        entry.update({k: v.contiguous() for k, v in entry.items() if k != "step"})
    again = learner_of("--accumulate_steps 1")
    again.model.load_state_dict(start.model.state_dict())
    again.load_state_dict(checkpoint)
    start.config = again.config
    for learner in (start, again):
        learn(learner, loss_of(learner, "good", 5), 0, 1)
    assert any(not p.is_contiguous() for p in again.model.parameters())
    assert_close(state_of(again), state_of(start), rtol=0, atol=0)


def broken_at(monkeypatch, calls, value=float("nan"), name="loss_giou_0"):
    """Spoil a loss of the training steps of these numbers; returns the criterion's calls."""
    forward = SetCriterion.forward
    seen = []

    def broken(self, outputs, targets):
        losses = forward(self, outputs, targets)
        if self.training:
            seen.append(None)
            if len(seen) - 1 in calls:
                losses = {**losses, name: losses[name] * value}
        return losses

    monkeypatch.setattr(SetCriterion, "forward", broken)
    return seen


def test_a_training_goes_on_after_a_loss_that_is_not_finite(tmp_path, capsys, monkeypatch):
    seen = broken_at(monkeypatch, {1})
    assert fit(f"--epochs 2 --print_freq 1 --output_dir {tmp_path}") == 0
    assert len(seen) == 2 * STEPS
    printed = capsys.readouterr().out.splitlines()
    [warning] = [line for line in printed if line.startswith("warning: ")]
    found = "epoch 0, step 1: update skipped, not finite: loss_giou_0 = nan; images ["
    assert warning.startswith(f"warning: {found}")
    assert len(json.loads(warning.partition("images ")[2])) == 4
    ends = [line for line in printed if line.startswith("Averaged stats: lr")]
    assert [line.endswith("  skipped: 1") for line in ends] == [True, False]
    assert not any("nan" in line for line in printed if line.startswith("Epoch"))
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record.get("train_skipped") for record in log] == [1, None]
    assert all(record["train_loss_giou_0"] > 0 for record in log)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    steps = {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()}
    assert steps == {2 * STEPS - 1}
    assert checkpoint["steps"] == 2 * STEPS


def test_losses_that_stay_not_finite_end_the_run(tmp_path, capsys, monkeypatch):
    """Across epochs: of three steps each."""
    seen = broken_at(monkeypatch, range(2, 100))
    assert fit(f"--epochs 9 --max_skipped_steps 4 --output_dir {tmp_path}") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: loss or gradient not finite in 4 updates in a row")
    assert "epoch 1, step 2 (loss_giou_0 = nan; images [" in printed.err
    assert "lower --lr" in printed.err
    assert len(seen) == 6
    warnings = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
    assert [line[:52] for line in warnings] == [
        f"warning: epoch {e}, step {s}: update skipped, not finite"
        for e, s in [(0, 2), (1, 0), (1, 1)]
    ]
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")  # of the end of epoch 0
    assert {int(entry["step"]) for entry in checkpoint["optimizer"]["state"].values()} == {2}
    assert all(t.isfinite().all() for t in checkpoint["model"].values())


def test_the_first_skipped_step_can_be_the_last(tmp_path, capsys, monkeypatch):
    broken_at(monkeypatch, {0}, float("inf"), "loss_ce")
    assert fit(f"--max_skipped_steps 1 --output_dir {tmp_path}") == 1
    assert "in 1 updates in a row, the last in epoch 0, step 0 (loss_ce = inf" in (
        capsys.readouterr().err
    )


def test_skipped_updates_of_an_interrupted_epoch_are_counted(tmp_path, capsys, monkeypatch):
    broken_at(monkeypatch, {0})
    finish = Learner.finish

    def interrupted(self):
        finish(self)
        if self.steps == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "finish", interrupted)
    assert fit(f"--epochs 1 --checkpoint_steps 1 --output_dir {tmp_path}") == 130
    monkeypatch.setattr(Learner, "finish", finish)
    assert fit(f"--epochs 1 --output_dir {tmp_path} --resume auto") == 0
    assert "  skipped: 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.txt").read_text())["train_skipped"] == 1


def test_an_evaluation_of_losses_that_are_not_finite_ends_the_run(tmp_path, capsys):
    fit(f"--epochs 1 --output_dir {tmp_path}")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    checkpoint["model"]["class_embed.weight"][0] = torch.nan
    del checkpoint["sha256"]
    write_checkpoint(checkpoint, tmp_path / "spoilt.pth")
    capsys.readouterr()
    assert cli.evaluate(f"--resume {tmp_path}/spoilt.pth --device cpu".split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the losses of the evaluation are not finite (loss_ce = nan, ")
    assert "loss_ce_0 = nan" in error
    assert "; images [" in error
