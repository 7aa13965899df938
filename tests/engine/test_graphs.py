# SPDX-License-Identifier: Apache-2.0
"""Steps from CUDA graphs are the steps themselves: on a GPU, and on a tape of operators without."""

from itertools import cycle, islice

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_fast.command_line import parse
from detr_fast.config import UsageError, configure
from detr_fast.data.batch import ImageBatch
from detr_fast.engine import build, graphs
from detr_fast.engine.batch import Batch
from detr_fast.engine.graphs import CudaRecorder, ShapeGraphs, recorder_of
from detr_fast.engine.log import MetricLogger
from detr_fast.engine.metrics import StepMetrics
from detr_fast.engine.optim import Learner, training_mode
from detr_fast.engine.precision import Precision
from detr_fast.engine.step import InferenceStep, TrainingStep, reports
from detr_fast.matcher.packing import Targets
from detr_fast.models.detr import build_detr
from tests.engine.tape import TapeRecorder

CLASSES = 4
CPU = torch.device("cpu")
# height, width, whether padded, boxes of an image: as many shapes as there are lines
SHAPES = [(64, 96, True, 3), (96, 64, True, 3), (64, 96, False, 3), (64, 64, True, 11)]


@pytest.fixture(autouse=True)
def one_thread():
    """The steps are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["tape", "cuda"])
def recorder(request):
    if request.param == "tape":
        return TapeRecorder()
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none")
    return CudaRecorder(torch.device("cuda"))


def device_of(recorder):
    return getattr(recorder, "device", CPU)


class Training:
    """A training on random batches; what it does follows from the flags alone."""

    def __init__(self, recorder=None, flags="", device=None):
        self.device = device or device_of(recorder)
        torch.manual_seed(0)
        config = configure(
            parse("", "", f"--dataset_file shapes --cuda_graphs off {flags}".split())
        )
        model = build_detr(config.model_config(CLASSES)).to(self.device)
        training_mode(model)
        self.learner = Learner(model, config, static_gradients=recorder is not None)
        self.criterion = build.build_criterion(config, CLASSES).to(self.device)
        precision = Precision(self.device)
        self.step = TrainingStep(self.learner, self.criterion, precision, recorder=recorder)
        self.infer = InferenceStep(model, precision, recorder=recorder)
        self.metrics = StepMetrics(MetricLogger())
        self.losses = []

    def batch(self, number, height, width, padded, boxes):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.rand(2, 3, height, width, generator=generator)
        smaller = torch.tensor([[height, width - 16], [height - 16, width]], dtype=torch.int32)
        targets = [
            {
                "labels": torch.randint(CLASSES, (count,), generator=generator),
                "boxes": torch.rand(count, 4, generator=generator) / 2 + 0.25,
                "image_id": torch.tensor(number),
            }
            for count in (boxes, number % boxes)
        ]
        packed = Targets.from_list(targets)
        images = ImageBatch(pixels, smaller if padded else None)
        return Batch(images.to(self.device), packed.to(self.device), targets)

    def run(self, steps, shapes=SHAPES):
        for number, shape in enumerate(islice(cycle(shapes), steps)):
            batch = self.batch(number, *shape)
            values = self.step(batch, number, steps)
            self.losses.append(values["loss"])  # the caller's, not the graph's
            self.metrics.add(number, batch.image_ids, values)
        self.metrics.finish()
        return self

    def state(self):
        buffers = self.learner.state_dict()["optimizer"]["state"]
        numbers = torch.stack(self.losses), self.metrics.log.averages()
        return {"model": self.learner.model.state_dict(), "optimizer": buffers, "log": numbers}


def assert_same(actual, expected):
    exact = {"rtol": 0, "atol": 0} if actual.device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(actual.state(), expected.state(), **exact)


FLAGS = {
    "default": "",
    "accumulated": "--accumulate_steps 3 --warmup_steps 5 --ema_decay 0.99",
    "encoder": "--enc_layers 1 --freeze query_embed",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_steps_are_those_without_graphs(recorder, flags):
    steps = 4 * len(SHAPES) * (3 if "accumulate" in FLAGS[flags] else 1) - 1
    eager = Training(device=device_of(recorder), flags=FLAGS[flags]).run(steps)
    replayed = Training(recorder, flags=FLAGS[flags]).run(steps)
    assert_same(replayed, eager)
    assert replayed.step.recorded.graphs.replays >= 2 * len(SHAPES) - 1


def test_dropout_goes_on_with_the_generator():
    """Recording draws no number; on a GPU kernels of other libraries may draw in other portions."""
    recorder = TapeRecorder()
    eager, replayed = (Training(r, flags="--dropout 0.2").run(15) for r in (None, recorder))
    assert_same(replayed, eager)
    assert recorder.recordings == len(SHAPES)


def test_weights_may_be_loaded_under_a_graph(recorder):
    trained = Training(recorder).run(12)
    assert len(trained.step.recorded.graphs) == len(SHAPES)
    fresh, device = Training(device=device_of(recorder)), device_of(recorder)
    trained.learner.model.load_state_dict(fresh.learner.model.state_dict())
    trained.learner.begin(0, 1)
    batch = fresh.batch(7, *SHAPES[0])
    values = trained.step(batch, 0, 1)
    fresh.learner.begin(0, 1)
    expected = fresh.step(batch, 0, 1)
    assert device.type == "cuda" or values["loss"] == expected["loss"]
    assert_close(values["loss"], expected["loss"])


def test_shapes_that_return_are_recorded_and_rare_ones_run(recorder):
    training = Training(recorder).run(9, SHAPES[:1])
    recorded = training.step.recorded.graphs
    assert (len(recorded), recorded.calls, recorded.replays) == (1, 9, 7)
    training.run(2, SHAPES[1:2])
    assert (len(recorded), recorded.calls, recorded.replays) == (1, 11, 7)
    expected = "CUDA graphs of training steps: 1 recorded, 7 of 11 batches replayed"
    assert reports(training.step, training.infer) == [expected]


def test_what_differs_in_one_point_has_a_graph_of_its_own():
    """Padding or none, room for targets, memory format and dtype."""
    recorder = TapeRecorder()
    work = ShapeGraphs(lambda inputs: inputs[0] + 1, recorder, "tests")
    image = torch.rand(1, 3, 4, 4)
    calls = [
        (image, None),
        (image, torch.zeros(1)),
        (image, torch.zeros(2)),
        (image.to(memory_format=torch.channels_last), None),
        (image.double(), None),
    ]
    for _ in range(4):
        for call in calls:
            assert_close(work(call), call[0] + 1, rtol=0, atol=0)
    assert recorder.recordings == len(calls)


def test_results_outlive_the_next_replay(recorder):
    infer = Training(recorder).infer
    images = [torch.rand(1, 3, 64, 64, device=device_of(recorder)) for _ in range(4)]
    first = [infer(ImageBatch(image)) for image in images]
    again = [infer.outputs(ImageBatch(image)) for image in images]
    assert infer.recorded.graphs.replays == 2
    for outputs, expected in zip(first, again, strict=True):
        assert_close(outputs, expected)
    assert not torch.equal(first[2]["pred_logits"], first[3]["pred_logits"])


def test_only_so_many_are_recorded_and_it_is_said(capsys):
    recorder = TapeRecorder()
    work = ShapeGraphs(lambda inputs: inputs[0] * 2, recorder, "tests", most=2)
    sizes = [1, 2, 3, 4]
    for _ in range(5):
        for size in sizes:
            assert_close(work([torch.ones(size)]), torch.full((size,), 2.0))
    assert (recorder.recordings, work.replays, work.calls) == (2, 6, 20)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "CUDA graphs of tests: 2 recorded; 2 are the most" in said[0]


def test_without_room_steps_go_on_and_it_is_said(capsys):
    recorder = TapeRecorder(room=1)
    eager = Training().run(19)
    assert_same(Training(recorder).run(19), eager)
    assert recorder.recordings == 1
    assert capsys.readouterr().out.count("1 recorded; no room; shapes without a graph") == 1


def test_where_recording_fails_steps_go_on_and_it_is_said(capsys):
    class Failing(TapeRecorder):
        def record(self, work):
            super().record(work)
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert_same(Training(Failing()).run(15), Training().run(15))
    assert capsys.readouterr().out.count("recording failed, shapes without a graph run") == 1


# ---- what a graph would not see


def test_the_tape_keeps_the_numbers_of_python():
    """As a graph does: or else no test here could fail."""
    numbers = iter(range(1, 10))
    work = ShapeGraphs(lambda inputs: inputs[0] * next(numbers), TapeRecorder(), "tests")
    assert [work([torch.ones(1)]).item() for _ in range(5)] == [1, 2, 3, 3, 3]


def test_a_number_of_python_that_changes_is_noticed():
    """The last update is of one batch, whose share in it is 1, not a half."""
    flags = "--accumulate_steps 2 --clip_max_norm 0"  # a clipped gradient is the same by any share
    eager, stale = Training(flags=flags), Training(TapeRecorder(), flags=flags)
    for training in (eager, stale):
        learner = training.learner
        learner.backward = lambda loss, learner=learner: (loss * learner._share).backward()
    with pytest.raises(AssertionError):
        assert_same(stale.run(13), eager.run(13))


def test_a_number_of_targets_that_is_read_on_the_host_is_refused():
    training = Training(TapeRecorder())
    criterion = training.step.criterion

    class Counting(type(criterion)):
        def forward(self, outputs, targets):
            losses = super().forward(outputs, targets)
            return losses | {"loss_ce": losses["loss_ce"] / sum(targets.count_host)}

    criterion.__class__ = Counting
    with pytest.raises(TypeError, match=r"use Targets\.count"):
        training.run(1)


def test_gradients_that_move_are_put_back():
    """A graph writes where they were; the optimizer would see nothing of it."""
    training = Training(TapeRecorder())
    before = {n: p.grad for n, p in training.run(4).learner.model.named_parameters()}
    training.learner.optimizer.zero_grad(set_to_none=True)
    training.run(8)
    assert all(before[n] is p.grad for n, p in training.learner.model.named_parameters())
    assert all(g is not None for g in before.values())


class _Strict(TorchDispatchMode):
    """Refuses data of the host: tensors on the CPU, and copies from there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, torch.Tensor) and leaf.is_cpu and leaf.dim()), func
        return result


@pytest.mark.parametrize("recipe", ["", "--model detr_resnet50 --backbone_weights none"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_recorded_part_copies_nothing_from_the_host(recipe, padded, meta):
    training = Training(flags=recipe, device=torch.device("cpu"))
    training.learner.model.to(meta)
    training.criterion.to(meta)
    learner = training.learner
    learner._losses = learner._losses.to(meta)
    batch = training.batch(0, 64, 96, padded, 3)
    images, targets = batch.images.to(meta), batch.targets.to(meta)
    targets = Targets(targets.labels, targets.boxes, targets.count, graphs._Unread((-1, -1)))
    with _Strict():
        values = training.step.forward_backward(images, targets)
    assert values["loss"].is_meta
    with pytest.raises(AssertionError), _Strict():
        training.step.forward_backward(batch.images, targets)


# ---- the flag


@pytest.mark.parametrize(("flag", "backend"), [("auto", "fast"), ("off", "fast")])
def test_without_a_gpu_nothing_is_recorded(flag, backend):
    arguments = f"--cuda_graphs {flag} --backend {backend}".split()
    assert recorder_of(configure(parse("", "", arguments)), CPU) is None


def test_graphs_that_cannot_be_had_are_refused():
    with pytest.raises(UsageError, match="--cuda_graphs on: the device is cpu"):
        recorder_of(configure(parse("", "", ["--cuda_graphs", "on"])), CPU)
