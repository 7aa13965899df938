# SPDX-License-Identifier: Apache-2.0
"""Gradients of float16: how a scale is found, what it leaves out, what it must not change."""

import io

import pytest
import torch
from torch.testing import assert_close

from detr_fast.engine.log import MetricLogger
from detr_fast.engine.loss_scale import LossScale
from detr_fast.engine.metrics import DivergenceWatch, StepMetrics, TrainingDivergedError
from detr_fast.engine.optim import Learner
from tests.engine.test_skipped_updates import learn, learner_of, loss_of, state_of


def scaled_learner(flags="--accumulate_steps 1", **options):
    plain = learner_of(flags)
    return Learner(plain.model, plain.config, scaled=True, **options)


def half_gradients(learner):
    """Let gradients be what float16 holds of them."""
    for parameter in learner.model.parameters():
        parameter.register_hook(lambda gradient: gradient.half().float())


def kinds(count):
    return [("good", seed) for seed in range(count)]


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scale_changes_no_update(clip, accumulate):
    """It is a power of 2: gradients come back to the bit."""
    flags = f"--clip_max_norm {clip} --accumulate_steps {accumulate} --warmup_steps 3"
    plain, scaled = learner_of(flags), scaled_learner(flags)
    for number, batch in enumerate(kinds(4)):
        for learner in (plain, scaled):
            learn(learner, loss_of(learner, *batch), number, 4)
    assert_close(state_of(scaled), state_of(plain), rtol=0, atol=0)
    assert torch.equal(scaled.norm, plain.norm)
    assert scaled.outcome().keys() == {"skipped", "gradient_norm", "loss_scale"}
    assert plain.outcome().keys() == {"skipped", "gradient_norm"}
    assert scaled.scale.good == 4 / accumulate


def test_a_scale_is_found():
    """Updates that overflow are as if they had not been; the gradients of the others fit."""
    learner, expected = scaled_learner(), learner_of("--accumulate_steps 1")
    half_gradients(learner)
    learner.scale.value.fill_(2.0**26)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    outcomes = []
    while not outcomes or outcomes[-1]["skipped"]:
        assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
        learn(learner, loss_of(learner, "good", 0), 0, 1)
        outcomes.append(learner.outcome())
    scales = [outcome["loss_scale"].item() for outcome in outcomes]
    assert len(scales) > 2
    assert scales == [2.0 ** (26 - i) for i in range(len(scales))]
    assert not outcomes[0]["gradient_norm"].isfinite()
    assert learner.scale.value == scales[-1]
    learn(expected, loss_of(expected, "good", 0), 0, 1)
    assert_close(learner.norm, expected.norm, rtol=1e-3, atol=0)
    head = learner.model.class_embed.weight
    assert not torch.equal(head, before["class_embed.weight"])
    assert learner.scale.good == 1


def test_without_a_scale_small_gradients_would_be_lost():
    """What it is for: in float16 nothing is left of a gradient of 1e-9."""
    moved = []
    for learner in (learner_of("--accumulate_steps 1"), scaled_learner()):
        half_gradients(learner)
        learner.begin(0, 1)
        learner.backward(learner.model.class_embed.bias.sum() * 1e-9)
        moved.append(bool(learner.model.class_embed.bias.grad.any()))
    assert moved == [False, True]


def test_a_scale_grows_again(monkeypatch):
    monkeypatch.setattr(LossScale, "interval", 2)
    learner = scaled_learner()
    scales = []
    for number in range(5):
        learn(learner, loss_of(learner, "good", number), number, 9)
        scales.append(learner.scale.value.item())
    assert scales == [2.0**16, 2.0**17, 2.0**17, 2.0**18, 2.0**18]
    learn(learner, loss_of(learner, "images", 1), 0, 1)
    assert (learner.scale.value, learner.scale.good) == (2.0**17, 0)


def test_a_checkpoint_holds_the_scale():
    """In the form of torch's GradScaler, which reads it, and whose states are read."""
    learner = scaled_learner()
    for number in range(3):
        learn(learner, loss_of(learner, ("good", "images", "good")[number], number), number, 9)
    state = learner.state_dict() | {"model": learner.model.state_dict()}
    assert (state["scaler"]["scale"], state["scaler"]["_growth_tracker"]) == (2.0**15, 1)
    torchs = torch.amp.GradScaler("cpu")
    torchs.load_state_dict(state["scaler"])
    assert torchs.state_dict() == state["scaler"]

    again = scaled_learner()
    before = again.scale.value
    again.load_state_dict(state)
    assert (again.scale.value, again.scale.good) == (2.0**15, 1)
    assert again.scale.value is before  # a CUDA graph may hold it
    fresh = scaled_learner()
    fresh.load_state_dict({name: value for name, value in state.items() if name != "scaler"})
    assert (fresh.scale.value, fresh.scale.good) == (2.0**16, 0)
    fresh.load_state_dict({**state, "scaler": {}})  # of a GradScaler that was off
    assert fresh.scale.value == 2.0**16
    learner_of("--accumulate_steps 1").load_state_dict(state)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a loss scale of"):
            fresh.load_state_dict({**state, "scaler": {"scale": wrong}})


def told(outcomes, limit=3):
    """What a watch says of steps: pairs of loss and loss scale, all left out."""
    metrics = StepMetrics(MetricLogger(stream=io.StringIO()), DivergenceWatch(limit), epoch=1)
    for batch, (loss, scale, skipped) in enumerate(outcomes):
        values = {"loss": loss, "skipped": skipped, "gradient_norm": float("inf")}
        values["loss_scale"] = scale
        metrics.add(batch, [batch], {n: torch.tensor(float(v)) for n, v in values.items()})
    metrics.finish()
    return metrics


def test_finding_a_scale_is_no_divergence(capsys):
    metrics = told([(2.0, 2.0**i, 1) for i in range(16, 0, -1)])
    assert metrics.watch.in_a_row == 0
    assert metrics.skipped == 16
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert lines[0] == (
        "epoch 1, step 0: update skipped, its gradient overflows at a loss scale of 65536"
    )
    assert not metrics.log.meters


def test_at_a_scale_of_1_it_is_one(capsys):
    with pytest.raises(TrainingDivergedError, match="3 updates in a row"):
        told([(2.0, 4, 1), (2.0, 2, 1), (2.0, 1, 1), (2.0, 0.5, 1), (2.0, 0.25, 1)])
    assert "warning: epoch 1, step 2: update skipped, not finite: norm of the gradient" in (
        capsys.readouterr().out
    )


def test_a_loss_that_is_not_finite_is_one_at_any_scale():
    nan = float("nan")
    with pytest.raises(TrainingDivergedError, match="3 updates in a row"):
        told([(nan, 2.0**16, 1), (nan, 2.0**15, 1), (nan, 2.0**14, 1)])


def test_overflows_between_do_not_end_a_row_of_divergence():
    nan = float("nan")
    metrics = told([(nan, 8, 1), (1.0, 4, 1), (nan, 2, 1)])
    assert metrics.watch.in_a_row == 2
    assert told([(nan, 8, 1), (1.0, 4, 0), (nan, 2, 1)]).watch.in_a_row == 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [True, False])
def test_static_gradients_change_no_update(accumulate, scaled):
    """They are the same tensors throughout, as a CUDA graph needs them, and laid out as weights."""
    flags = f"--accumulate_steps {accumulate}"
    plain = learner_of(flags)
    model = learner_of(flags).model
    static = Learner(model, plain.config, scaled=scaled, static_gradients=True)
    learning = [p for p in model.parameters() if p.requires_grad]
    places = [p.grad.data_ptr() for p in learning]
    assert all(p.grad.stride() == p.stride() for p in learning)
    for number, batch in enumerate(kinds(4)):
        for learner in (plain, static):
            learn(learner, loss_of(learner, *batch), number, 4)
    assert [p.grad.data_ptr() for p in learning] == places
    assert_close(state_of(static), state_of(plain), rtol=1e-6, atol=1e-7)


def test_what_a_cuda_graph_would_read_stays_in_place():
    learner = scaled_learner("--accumulate_steps 3", static_gradients=True)
    held = [learner._factor, learner.scale.value, learner._losses]
    places = [tensor.data_ptr() for tensor in held]
    factors = []
    for number in range(4):  # three batches, and a window of one
        learner.begin(number, 4)
        factors.append(learner._factor.item())
        learner.backward(loss_of(learner, "good", number))
        learner.finish()
    assert factors == pytest.approx([2.0**16 / 3] * 3 + [2.0**16])
    now = [learner._factor, learner.scale.value, learner._losses]
    assert all(one is other for one, other in zip(now, held, strict=True))
    assert [tensor.data_ptr() for tensor in held] == places
