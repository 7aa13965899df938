# SPDX-License-Identifier: Apache-2.0
"""Console lines and log.txt: their form, their numbers, and what they cost."""

import io
import json
import math
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from detr_fast.engine import log
from detr_fast.engine.log import JsonLog, MetricLogger, SmoothedValue, read_log, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that stands still but where a test moves it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log, "perf_counter", clock)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return clock


class Loader:
    """`count` items, each of which takes `wait` seconds to come."""

    def __init__(self, count, clock, wait):
        self.count, self.clock, self.wait = count, clock, wait

    def __len__(self):
        return self.count

    def __iter__(self):
        for index in range(self.count):
            self.clock.now += self.wait
            yield index


def train_log(stream):
    """A logger with the meters of a training loop in their order."""
    logger = MetricLogger(delimiter="  ", stream=stream)
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    logger.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    return logger


def test_training_lines_have_the_original_form(clock):
    stream = io.StringIO()
    logger = train_log(stream)
    for index in logger.log_every(Loader(12, clock, wait=0.25), 10, "Epoch: [0]"):
        clock.now += 0.75
        logger.update(loss=torch.tensor(40.0 - index), loss_ce=4.0 - index / 8)
        logger.update(class_error=torch.tensor(97.21484375), lr=1e-4)
    assert stream.getvalue().splitlines() == [
        "Epoch: [0]  [ 0/12]  eta: 0:00:11  lr: 0.000100  class_error: 97.21  "
        "loss: 40.0000 (40.0000)  loss_ce: 4.0000 (4.0000)  time: 1.0000  data: 0.2500",
        "Epoch: [0]  [10/12]  eta: 0:00:01  lr: 0.000100  class_error: 97.21  "
        "loss: 35.0000 (35.0000)  loss_ce: 3.3750 (3.3750)  time: 1.0000  data: 0.2500",
        "Epoch: [0]  [11/12]  eta: 0:00:00  lr: 0.000100  class_error: 97.21  "
        "loss: 34.0000 (34.5000)  loss_ce: 3.2500 (3.3125)  time: 1.0000  data: 0.2500",
        "Epoch: [0] Total time: 0:00:12 (1.0000 s / it)",
    ]


def test_evaluation_lines_have_the_original_form(clock):
    """The averaged statistics are those of a published evaluation, down to the byte."""
    published = {
        "loss": (1.0253, 1.1978),
        "loss_ce": (0.3285, 0.4904),
        "loss_bbox": (0.2005, 0.2246),
        "loss_giou": (0.4441, 0.4828),
        "loss_ce_unscaled": (0.3285, 0.4904),
        "class_error_unscaled": (17.8571, 22.0519),
        "cardinality_error_unscaled": (4.0, 5.0298),
    }
    stream = io.StringIO()
    logger = MetricLogger(delimiter="  ", stream=stream)
    logger.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    for index in logger.log_every(Loader(2, clock, wait=3700.0), 10, "Test:"):
        logger.update(class_error=14.285714)
        for name, (median, mean) in published.items():  # the lower of two numbers is their median
            logger.update(**{name: (median, 2 * mean - median)[index]})
    logger.say(f"Averaged stats: {logger}")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("Test:  [0/2]  eta: 1:01:40  class_error: 14.29  loss: 1.0253 (")
    assert lines[-2] == "Test: Total time: 2:03:20 (3700.0000 s / it)"
    assert lines[-1] == (
        "Averaged stats: class_error: 14.29  loss: 1.0253 (1.1978)  loss_ce: 0.3285 (0.4904)  "
        "loss_bbox: 0.2005 (0.2246)  loss_giou: 0.4441 (0.4828)  loss_ce_unscaled: 0.3285 (0.4904)"
        "  class_error_unscaled: 17.8571 (22.0519)  cardinality_error_unscaled: 4.0000 (5.0298)"
    )


def test_memory_is_told_where_cuda_is_used(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1234.4 * 2**20)
    stream = io.StringIO()
    for _ in MetricLogger(stream=stream).log_every([0], 10, "Test:"):
        clock.now += 0.5
    assert stream.getvalue() == (
        "Test:  [0/1]  eta: 0:00:00  time: 0.5000  data: 0.0000  max mem: 1234\n"
        "Test: Total time: 0:00:00 (0.5000 s / it)\n"
    )


def test_lines_follow_the_stdout_of_the_moment(capsys):
    say("hello")
    for _ in MetricLogger().log_every([], 10, "Test:"):
        pytest.fail("an empty loader has no item")
    assert capsys.readouterr().out == "hello\nTest: Total time: 0:00:00 (0.0000 s / it)\n"


def test_time_includes_the_wait_for_the_device(clock, monkeypatch):
    """Work that was only submitted ends with the copy of the metrics: the line must count it."""
    read = SmoothedValue.read

    def slow_read(series):
        series = list(series)
        if any(isinstance(value, torch.Tensor) for one in series for value, _ in one._unread):
            clock.now += 3.0
        read(series)

    monkeypatch.setattr(SmoothedValue, "read", staticmethod(slow_read))
    stream = io.StringIO()
    logger = MetricLogger(stream=stream)
    for _ in logger.log_every([0], 10, "Test:"):
        logger.update(loss=torch.tensor(1.0))
    assert "time: 3.0000" in stream.getvalue()


def test_the_wait_of_a_line_is_shared_out_to_its_items(clock):
    """On a GPU the host waits at a line for the work of all steps since the one before."""

    def wait():
        clock.now += 6.0

    stream = io.StringIO()
    for _ in MetricLogger(stream=stream).log_every(range(30), 15, "Test:", before_line=wait):
        pass
    lines = stream.getvalue().splitlines()
    # 1, 15 and 14 items; the mean is that of the last 20
    assert [line.split("time: ")[1][:6] for line in lines[:3]] == ["6.0000", "0.7500", "0.4200"]
    assert "eta: 0:00:10" in lines[1]  # 14 of 12 s / 16
    assert lines[3].endswith("(0.6000 s / it)")


@pytest.mark.parametrize("as_tensor", [False, True])
def test_statistics_equal_torch(as_tensor):
    values = torch.randn(57, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    series = SmoothedValue(window_size=20)
    for value in values:
        series.update(value if as_tensor else value.item())
    window = values[-20:]
    assert series.median == window.median().item()
    assert series.avg == pytest.approx(window.mean().item(), rel=1e-12)
    assert series.global_avg == pytest.approx(values.mean().item(), rel=1e-12)
    assert series.max == window.max().item()
    assert series.value == values[-1].item()
    assert str(series) == f"{window.median():.4f} ({values.mean():.4f})"


def test_values_count_with_their_weight():
    series = SmoothedValue()
    series.update(1.0, n=3)
    series.update(torch.tensor(5.0), n=1)
    assert series.global_avg == 2.0


def test_nan_shows_until_it_leaves_the_window():
    series = SmoothedValue(window_size=2)
    for value in (1.0, math.nan, 3.0):
        series.update(value)
    assert all(map(math.isnan, (series.median, series.avg, series.max, series.global_avg)))
    series.update(5.0)
    assert (series.median, series.avg, series.max) == (3.0, 4.0, 5.0)
    assert str(SmoothedValue()) == "nan (nan)"


class Reads(TorchFunctionMode):
    """Notes the calls that bring a tensor to the host: on a GPU each of them waits."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "tolist", "numpy", "cpu", "to", "__float__", "__bool__"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_tensors_are_read_once_per_line(clock):
    stream = io.StringIO()
    logger = train_log(stream)
    with Reads() as reads:
        for index in logger.log_every(Loader(21, clock, wait=0.1), 10, "Epoch: [3]"):
            losses = {f"loss_{i}": torch.full((), float(i + index)) for i in range(12)}
            logger.update(**losses, class_error=torch.zeros(1), lr=0.5)
    assert stream.getvalue().count("\n") == 4
    assert reads.names == ["tolist"] * 3  # lines 0, 10 and 20
    assert logger.averages() == {"lr": 0.5, "class_error": 0.0} | {
        f"loss_{i}": i + 10.0 for i in range(12)
    }


def test_metrics_hold_no_graph_and_keep_their_type():
    weight = torch.ones((), requires_grad=True)
    logger = MetricLogger()
    logger.update(loss=weight * 2, count=torch.tensor(2**53 - 1), half=torch.tensor(0.5).half())
    assert not any(v.requires_grad for m in logger.meters.values() for v, _ in m._unread)
    assert logger.averages() == {"loss": 2.0, "count": float(2**53 - 1), "half": 0.5}


def test_a_vector_is_no_metric():
    with pytest.raises(ValueError, match=r"'loss_bbox' takes one number.*\(4,\)"):
        MetricLogger().update(loss_bbox=torch.zeros(4))


def test_a_terminal_shows_a_bar_below_whole_lines():
    stream = Terminal()
    logger = MetricLogger(stream=stream)
    for index in logger.log_every(list(range(3)), 1, "Epoch: [0]"):
        logger.update(loss=float(index))
    logger.say("done")
    shown = stream.getvalue()
    assert "Epoch: [0] 100% |" in shown
    assert "3/3" in shown
    assert "left" in shown
    # every line begins at the left margin, on what the bar has left blank
    whole = [line.rsplit("\r", 1)[-1] for line in shown.split("\n")]
    assert [line[:15] for line in whole] == [
        "Epoch: [0]  [0/",
        "Epoch: [0]  [1/",
        "Epoch: [0]  [2/",
        "Epoch: [0] Tota",
        "done",
        "",
    ]


def test_a_file_shows_no_bar():
    stream = io.StringIO()
    for _ in MetricLogger(stream=stream).log_every([0, 1], 1, "Epoch: [0]"):
        pass
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 3


def test_without_tqdm_a_terminal_shows_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    for _ in MetricLogger(stream=stream).log_every([0, 1], 1, "Epoch: [0]"):
        pass
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 3


def test_a_broken_loop_takes_its_bar_away(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)  # or the end of the object would take the bar away

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for _ in MetricLogger(stream=Terminal()).log_every([0, 1], 1, "Epoch: [0]"):
            raise KeyboardInterrupt
    assert [bar.disable for bar in bars] == [True]  # what close() leaves


def test_json_log_is_what_plot_logs_reads(tmp_path):
    """The recipe of the original's plot_logs: frames, gaps filled, smoothed, mAP from a column."""
    pandas = pytest.importorskip("pandas")
    import numpy as np

    json_log = JsonLog(tmp_path / "run" / "log.txt")
    for epoch in range(4):
        record = {"train_class_error": 90.0 - epoch, "train_loss_bbox_unscaled": 0.5 / (epoch + 1)}
        record |= {"test_class_error": 80.0 - epoch, "test_loss_bbox_unscaled": 0.25}
        if epoch == 1:
            record["test_class_error"] = math.nan
        if epoch != 2:
            record["test_coco_eval_bbox"] = np.linspace(0, 0.11, 12) + epoch
        json_log.append(record | {"epoch": epoch, "n_parameters": 41302368})
    frame = pandas.read_json(tmp_path / "run" / "log.txt", lines=True)
    assert frame["epoch"].tolist() == [0, 1, 2, 3]
    assert frame["n_parameters"].tolist() == [41302368] * 4
    for field in ("class_error", "loss_bbox_unscaled"):
        smooth = frame[[f"train_{field}", f"test_{field}"]].interpolate().ewm(com=0).mean()
        assert smooth.notna().all(axis=None)
    smooth = frame[["test_class_error"]].interpolate().ewm(com=0).mean()
    assert smooth["test_class_error"].tolist() == [80.0, 79.0, 78.0, 77.0]
    stacked = np.stack(frame["test_coco_eval_bbox"].dropna().values)
    assert stacked.shape == (3, 12)
    np.testing.assert_allclose(stacked[:, 1], [0.01, 1.01, 3.01])
    pandas.DataFrame(stacked[:, 1]).ewm(com=0).mean()


def test_json_log_writes_valid_json_of_any_number(tmp_path):
    path = tmp_path / "log.txt"
    record = {"loss": math.nan, "rate": torch.tensor(0.5), "stats": [1.0, math.inf], "n": 3}
    JsonLog(path).append(record | {"note": "grün", "shape": (1, torch.tensor([2, 3]))})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "loss": None,
        "rate": 0.5,
        "stats": [1.0, None],
        "n": 3,
        "note": "grün",
        "shape": [1, [2, 3]],
    }


def test_a_resumed_run_replaces_the_epochs_it_repeats(tmp_path):
    path = tmp_path / "log.txt"
    first = JsonLog(path)
    for epoch in range(4):
        first.append({"epoch": epoch, "run": 1})
    with path.open("a") as file:
        file.write('{"epoch": 4, "ru')  # the run was killed here
    before = path.read_bytes()
    resumed = JsonLog(path, start_epoch=2)
    assert path.read_bytes() == before  # nothing is lost before there is something new
    for epoch in (2, 3):
        resumed.append({"epoch": epoch, "run": 2})
    runs = [(record["epoch"], record["run"]) for record in read_log(path)]
    assert runs == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert path.read_text().count("\n") == 4
    JsonLog(path).append({"epoch": 0, "run": 3})
    assert read_log(path) == [{"epoch": 0, "run": 3}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.txt"]


def test_a_broken_log_names_its_line(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\nnot json\n{"epoch": 2}\n')
    with pytest.raises(ValueError, match=r"log\.txt, line 2 is not JSON"):
        read_log(path)
    path.write_text('{"epoch": 0}\n[1]\n')
    with pytest.raises(ValueError, match=r"line 2 is not a JSON object: \[1\]"):
        read_log(path)
