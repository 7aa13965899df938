# SPDX-License-Identifier: Apache-2.0
"""The compiled model: one graph for all sizes, few compilations, and the outputs of the model."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException, Unsupported
from torch.testing import assert_close

from detr_fast import ops
from detr_fast.command_line import parse
from detr_fast.config import UsageError, configure
from detr_fast.data.batch import ImageBatch
from detr_fast.engine import compiled as subject
from detr_fast.engine.compiled import CompiledModel, compiler_of
from detr_fast.models.detr import MODELS, build_detr
from detr_fast.models.tiny import DETR_TINY
from tests.engine.test_graphs import Training

CPU = torch.device("cpu")
# an epoch of buckets; one grid of the tiny model has as many cells as it has queries
EPOCH = [(64, 96), (96, 64), (128, 128), (192, 128), (128, 192), (160, 160), (64, 64), (192, 192)]
THIN = {"dim_feedforward": 64, "enc_layers": 1, "dec_layers": 2, "num_queries": 9, "dropout": 0.0}
CONFIGS = {
    "tiny": replace(DETR_TINY, position_embedding="sine"),
    "tiny learned": replace(DETR_TINY, position_embedding="learned", enc_layers=1),
    "R50": replace(MODELS["detr_resnet50"], num_classes=4, **THIN),
}


@pytest.fixture(autouse=True)
def alone():
    """Nothing of other tests is compiled, and threads do not wait for each other."""
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


def images(height, width, padded=True, count=2):
    pixels = torch.rand(count, 3, height, width)
    smaller = [[height, width - 16], [height - 16, width]] * count
    sizes = torch.tensor(smaller[:count], dtype=torch.int32) if padded else None
    return ImageBatch(pixels, sizes)


def random_model(config):
    torch.manual_seed(0)
    return build_detr(config)


def results(forward, model, batch, gradients):
    """Outputs, and gradients of all parameters."""
    with nullcontext() if gradients else torch.no_grad():
        outputs = forward(batch)
    if not gradients:
        return outputs, None
    model.zero_grad()
    layers = [outputs, *outputs["aux_outputs"]]
    sum(x.square().mean() for layer in layers for x in (*layer.values(),)[:2]).backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", CONFIGS)
def test_an_epoch_of_mixed_sizes_takes_a_graph_for_each_variant(config):
    """No break: with one, compiling raises. Dynamo's cache is what is counted, not only ours."""
    model = random_model(CONFIGS[config])
    forward = CompiledModel(model, backend="aot_eager", required=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for number, (training, padded) in enumerate([(True, True), (True, False), (False, True)]):
        model.train(training)
        statistics = copy.deepcopy(model.state_dict())
        for size in EPOCH if config != "R50" else EPOCH[:4]:
            batch = images(*size, padded)
            actual = results(forward, model, batch, training)
            model.load_state_dict(statistics)
            assert_close(actual, results(model, model, batch, training), **tolerance)
            model.load_state_dict(statistics)
            with (
                torch.set_grad_enabled(training),
                torch.compiler.set_stance("fail_on_recompile"),
            ):
                forward._call(batch)
            model.load_state_dict(statistics)
        assert forward.compilations == number + 1
    assert forward.report() == "torch.compile: 3 graphs of the model so far"


def test_an_incomplete_batch_costs_one_more():
    model = random_model(CONFIGS["tiny"]).eval()
    forward = CompiledModel(model, backend="aot_eager")
    with torch.no_grad():
        for count in (4, 4, 3, 4, 2):
            batch = images(64, 96, count=count)
            assert_close(forward(batch), model(batch))
    assert forward.compilations == 2


def test_the_model_knows_nothing_of_it():
    """State dict, copies and the cache of inference are those of the model; weights may change."""
    model = random_model(CONFIGS["tiny"]).eval()
    names, batch = list(model.state_dict()), images(64, 96, padded=False)
    forward = CompiledModel(model, backend="aot_eager")
    with torch.no_grad():
        before = forward(batch)
        assert list(model.state_dict()) == names
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_close(forward(batch), model(batch))
        assert not torch.equal(forward(batch)["pred_logits"], before["pred_logits"])
        model.load_state_dict(twin.state_dict())
        assert_close(forward(batch), before, rtol=0, atol=0)
        assert_close(twin(batch), before)
    assert forward.compilations == 1


def test_autocast_has_graphs_of_its_own():
    model = random_model(CONFIGS["tiny"]).eval()
    forward, batch = CompiledModel(model, backend="aot_eager"), images(64, 96)
    for _ in range(2):
        for dtype in (None, torch.bfloat16):
            cast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
            with torch.no_grad(), cast:
                assert_close(forward(batch), model(batch), rtol=2e-2, atol=2e-2)
    assert forward.compilations == 2


class Static(nn.Module):
    """Has a graph for each height: it makes a number of it."""

    def forward(self, images):
        height = images.tensors.shape[2]
        return {"sum": images.tensors.sum() * [0, 1, 2, 3][height // 64]}


def test_over_budget_is_said_once_and_what_is_compiled_stays_so(capsys):
    forward = CompiledModel(Static(), backend="eager", budget=2)
    heights = [64, 128, 192, 200, 64, 128]
    for height in heights:
        batch = images(height, 64)
        assert_close(forward(batch), forward.model(batch))
    said = capsys.readouterr().out.splitlines()
    assert forward.compilations == 2
    assert len(said) == 1
    assert said[0].startswith("warning: --compile: all 2 graphs of the model are made")
    assert "(2, 3, 192, 64)" in said[0]
    assert "--compile off" in said[0]
    for height, compiled in ((64, True), (128, True), (192, False)):
        forward._ran_compiled = False
        forward(images(height, 64))
        assert forward._ran_compiled == compiled


def test_more_graphs_than_torch_has_room_for_by_itself(capsys):
    class Wide(nn.Module):
        def forward(self, images):
            height = images.tensors.shape[2]
            return {"sum": images.tensors.sum() * list(range(20))[height // 64]}

    forward = CompiledModel(Wide(), backend="eager")
    for height in range(64, 64 * 17, 64):
        forward(images(height, 64))
    assert forward.compilations == 16 > torch._dynamo.config.recompile_limit
    assert capsys.readouterr().out == ""


class Broken(nn.Module):
    """A graph break."""

    def forward(self, images):
        torch._dynamo.graph_break()
        return {"sum": images.tensors.sum()}


def test_a_graph_break_is_an_error_where_compiling_is_asked_for():
    with pytest.raises(Unsupported):
        CompiledModel(Broken(), backend="eager")(images(64, 64))


def test_where_it_fails_unasked_the_model_runs_and_it_is_said(capsys):
    forward = CompiledModel(Broken(), backend="eager", required=False)
    for _ in range(2):
        batch = images(64, 64)
        assert_close(forward(batch), forward.model(batch))
    [said] = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: torch.compile failed, the model runs uncompiled: ")
    assert forward.report() == ""


def test_an_error_of_the_model_stays_one():
    forward = CompiledModel(random_model(CONFIGS["tiny"]), backend="eager", required=False)
    with pytest.raises((TypeError, ValueError, TorchDynamoException)):
        forward(ImageBatch(torch.zeros(2, 4, 64, 64)))


def test_a_break_that_is_planted_in_the_model_is_found(monkeypatch):
    model, attention = random_model(CONFIGS["tiny"]), ops.attention

    def waiting(q, *args, **kwargs):
        if q.sum() > 0:
            q = q * 1
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(ops, "attention", waiting)
    with pytest.raises(TorchDynamoException):
        CompiledModel(model, backend="aot_eager")(images(64, 96))


def test_inductor_trains_and_infers_as_the_model_does():
    """Compiled by Inductor: steps of a training, at two sizes, then inference."""
    if reason := subject.why_not_compiled(CPU):
        pytest.skip(reason)
    shapes = [(64, 96, True, 3), (96, 128, True, 3)]
    eager, fast = Training(), Training()
    forward = CompiledModel(fast.learner.model)
    fast.step.forward = fast.infer.forward = forward
    for training in (eager, fast):
        training.run(6, shapes)
    assert forward.compilations <= len(shapes)  # Inductor may make a number of a stride
    assert_close(torch.stack(fast.losses), torch.stack(eager.losses), rtol=1e-3, atol=1e-3)
    fast.learner.model.load_state_dict(eager.learner.model.state_dict())
    for training in (eager, fast):
        training.learner.model.eval()
    for shape in shapes:
        batch = eager.batch(3, *shape).images
        assert_close(fast.infer(batch), eager.infer(batch), rtol=1e-3, atol=1e-4)
    assert forward.compilations <= len(shapes) + 1


# ---- the flag


def flags(line):
    return configure(parse("", "", line.split()))


def test_on_a_cpu_it_is_off_unless_asked_for(monkeypatch):
    model = nn.Identity()
    assert compiler_of(flags("--compile auto"), CPU)(model) is model
    assert compiler_of(flags("--compile off"), CPU)(model) is model
    monkeypatch.setattr(subject, "why_not_compiled", lambda device: "")
    asked = compiler_of(flags("--compile on"), CPU)(model)
    assert isinstance(asked, CompiledModel)
    assert asked.required


def test_on_a_gpu_it_is_on_to_train(monkeypatch):
    model, gpu = nn.Identity(), torch.device("cuda")
    monkeypatch.setattr(subject, "why_not_compiled", lambda device: "")
    assert not compiler_of(flags("--compile auto"), gpu)(model).required
    assert compiler_of(flags("--compile auto --eval --resume x"), gpu)(model) is model
    assert compiler_of(replace(flags(""), backend="reference"), gpu)(model) is model


def test_without_a_compiler_auto_says_so_and_on_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(subject, "find_spec", lambda name: None)
    why = "no C compiler: no-such-compiler is not on the PATH"
    with pytest.raises(UsageError, match=f"--compile on: {why}"):
        compiler_of(flags("--compile on"), CPU)
    model = nn.Identity()
    assert compiler_of(flags("--compile auto"), torch.device("cuda"))(model) is model
    assert capsys.readouterr().out == "the model runs uncompiled: triton is not installed\n"
