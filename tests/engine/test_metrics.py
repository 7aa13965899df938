# SPDX-License-Identifier: Apache-2.0
"""Metrics that are read late, and what becomes of those that are not finite."""

import io
import math
import re

import pytest
import torch

from detr_fast.engine.log import MetricLogger
from detr_fast.engine.metrics import (
    DivergenceWatch,
    StepMetrics,
    TrainingDivergedError,
    lateness_on,
    not_finite,
)

NAN, INF = math.nan, math.inf


def metrics_of(lateness=0, limit=10):
    log = MetricLogger(stream=io.StringIO())
    return StepMetrics(log, DivergenceWatch(limit), epoch=3, lateness=lateness)


def step(metrics, batch, loss, skipped=None, norm=1.0, images=None, **terms):
    """Add a step that ends in an update, skipped where the loss is not finite."""
    if skipped is None:
        skipped = not math.isfinite(loss)
    values = {"loss": loss, **terms, "skipped": float(skipped), "gradient_norm": norm}
    values = {name: torch.tensor(value) for name, value in values.items()}
    metrics.add(batch, [batch] if images is None else images, values)


def logged(lateness, losses, print_freq):
    """The loss that each line shows, and the meters after the epoch."""
    metrics = metrics_of(lateness)
    lines = metrics.log.log_every(losses, print_freq, before_line=metrics.turn)
    for batch, loss in enumerate(lines):
        step(metrics, batch, loss, loss_ce=loss / 2)
    metrics.finish()
    shown = re.findall(r"loss: \S+ \((\S+)\)", metrics.log.stream.getvalue())
    return [float(mean) for mean in shown], metrics.log.state()


def test_a_line_shows_the_period_before():
    """But for the first one, which waits: it has nothing else to show."""
    losses = [float(i) for i in range(10)]
    on_time, state = logged(0, losses, print_freq=3)
    assert on_time == [0.0, 1.5, 3.0, 4.5]  # means of 0, 0..3, 0..6, 0..9
    late, same = logged(1, losses, print_freq=3)
    assert late == [0.0, 0.0, 1.5, 3.0]
    later, _ = logged(2, losses, print_freq=3)
    assert later == [0.0, 0.0, 0.0, 1.5]
    assert same == state


def test_metrics_are_late_where_the_host_runs_ahead():
    assert lateness_on(torch.device("cpu")) == 0
    assert lateness_on(torch.device("cuda:1")) == 1


def test_steps_with_other_terms_may_follow_each_other():
    metrics = metrics_of()
    step(metrics, 0, 1.0, loss_ce=0.25)
    step(metrics, 1, 3.0)
    metrics.finish()
    assert metrics.log.averages() == {"loss": 2.0, "loss_ce": 0.25}


def test_a_skipped_update_is_named_and_not_averaged(capsys):
    metrics = metrics_of()
    terms = {"loss_ce_3": NAN, "loss_ce_3_unscaled": NAN, "loss_bbox": 5.0}
    step(metrics, 0, 2.0)
    step(metrics, 1, NAN, images=[7, 9], **terms, loss_bbox_unscaled=1.0, loss_giou_unscaled=INF)
    step(metrics, 2, 4.0)
    metrics.finish()
    assert capsys.readouterr().out == (
        "warning: epoch 3, step 1: update skipped, not finite: loss_ce_3 = nan, loss_giou = inf; "
        "images [7, 9]\n"
    )
    assert metrics.log.averages() == {"loss": 3.0}
    assert metrics.skipped == 1
    assert metrics.watch.in_a_row == 0


def test_a_gradient_that_is_not_finite_is_named(capsys):
    metrics = metrics_of()
    step(metrics, 5, 2.0, skipped=True, norm=INF)
    metrics.finish()
    assert capsys.readouterr().out == (
        "warning: epoch 3, step 5: update skipped, not finite: norm of the gradient = inf; "
        "images [5]\n"
    )
    assert not metrics.log.meters


def test_of_several_batches_the_guilty_ones_are_named(capsys):
    """With --accumulate_steps only the last batch of a window ends in an update."""
    metrics = metrics_of()
    for batch, loss in enumerate((1.0, NAN)):
        values = {"loss": torch.tensor(loss), "loss_ce_unscaled": torch.tensor(loss)}
        metrics.add(batch, [batch], values)
        metrics.turn()  # a line of the log may come between them
    step(metrics, 2, 3.0, skipped=True, norm=NAN)
    metrics.finish()
    assert "step 2: update skipped, not finite: loss_ce = nan; images [1]" in (
        capsys.readouterr().out
    )
    assert metrics.log.averages() == {"loss": 1.0, "loss_ce_unscaled": 1.0}
    assert metrics.skipped == 1
    metrics.add(3, [3], {"loss": torch.tensor(1.0)})
    step(metrics, 4, 1.0, skipped=True, norm=NAN)
    metrics.finish()
    assert "norm of the gradient = nan; images [3, 4]" in capsys.readouterr().out


@pytest.mark.parametrize("lateness", [0, 1])
def test_many_in_a_row_end_the_run(lateness):
    """The count goes on from epoch to epoch."""
    watch = DivergenceWatch(3)

    def train(epoch, losses):
        metrics = StepMetrics(MetricLogger(), watch, epoch=epoch, lateness=lateness)
        for batch in metrics.log.log_every(range(len(losses)), 2, before_line=metrics.turn):
            step(metrics, batch, losses[batch])
        metrics.finish()

    train(0, [NAN, NAN, 1.0, NAN])
    with pytest.raises(TrainingDivergedError, match=r"3 updates in a row.* epoch 1, step 1 \(loss"):
        train(1, [NAN, NAN, NAN])


def test_a_sum_that_overflows_has_no_guilty_term():
    assert not_finite({"loss": INF, "loss_ce": 1e38, "loss_ce_unscaled": 1e38}) == {"loss": INF}
    assert not_finite({"loss": 1.0, "loss_ce_unscaled": 1.0}) == {}
