# SPDX-License-Identifier: Apache-2.0
"""What inference keeps: used again, and never where anything that it depends on has changed."""

import copy
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from detr_fast.engine.dispatched import dispatched
from detr_fast.models.inference_cache import MOST_ENTRIES, InferenceCache
from tests.models.random_models import SMALL, random_detr, random_images

CPU = torch.device("cpu")


class Counted(torch.nn.Module):
    """Doubles a weight, and counts how often it does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.kept = InferenceCache()
        self.computed = 0

    def forward(self, key=0):
        def double():
            self.computed += 1
            return self.weight * 2

        return self.kept(double, CPU, self.weight, key=(key,))


@pytest.fixture
def counted():
    module = Counted().eval()
    with torch.no_grad():
        yield module


def test_a_result_is_kept(counted):
    assert counted() is counted()
    assert counted.computed == 1


def test_another_key_has_another_result_and_few_are_kept(counted):
    for key in range(MOST_ENTRIES + 2):
        counted(key)
        counted(0)
    assert counted.computed == MOST_ENTRIES + 2
    counted(MOST_ENTRIES + 1)
    assert counted.computed == MOST_ENTRIES + 2
    counted(1)  # the one whose turn was longest ago
    assert counted.computed == MOST_ENTRIES + 3


def load(module):
    module.load_state_dict({"weight": torch.full((3,), 5.0)})


def exchange_parameter(module):
    module.weight = torch.nn.Parameter(torch.full((3,), 5.0))


def exchange_data(module):
    module.weight.data = torch.full((3,), 5.0)


def step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=4.0)
    module.weight.grad = -torch.ones(3)
    optimizer.step()


def train_by_data(module):
    """What writes to the data of a weight is no change to torch; a switch of mode is one to us."""
    module.train()
    module.weight.data.fill_(5.0)
    module.eval()


def move(module):
    module.double().float()
    module.weight.data.fill_(5.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight.fill_(5.0),
        lambda module: module.weight.detach().mul_(5.0),
        lambda module: module.state_dict()["weight"].copy_(torch.full((3,), 5.0)),
        load,
        exchange_parameter,
        exchange_data,
        step,
        train_by_data,
        move,
    ],
    ids=lambda change: change.__name__,
)
def test_a_changed_weight_is_computed_with(counted, change):
    assert_close(counted(), torch.full((3,), 2.0))
    change(counted)
    assert_close(counted(), torch.full((3,), 10.0))


@pytest.mark.parametrize("elsewhere", ["training", "gradients", "fake", "vmap", "functional"])
def test_elsewhere_nothing_is_kept(counted, elsewhere):
    if elsewhere == "training":
        counted.train()
    for _ in range(2):
        if elsewhere == "gradients":
            with torch.enable_grad():
                assert counted().requires_grad
        elif elsewhere == "fake":
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                counted()
        elif elsewhere == "vmap":
            weights = {"weight": torch.ones(4, 3)}
            call = torch.func.vmap(lambda w: torch.func.functional_call(counted, w, ()))
            assert_close(call(weights), torch.full((4, 3), 2.0))
        elif elsewhere == "functional":
            torch.func.functional_call(counted, {"weight": torch.ones(3)}, ())
        else:
            counted()
    assert counted.computed == 2
    assert_close(counted.eval()(), torch.full((3,), 2.0))
    assert type(counted()) is torch.Tensor


@pytest.mark.parametrize("tracer", ["make_fx", "fake tensors"])
def test_a_tracer_gets_the_computation(counted, tracer):
    counted()
    if tracer == "make_fx":
        traced = make_fx(lambda: counted())()
        assert any(node.op == "call_function" for node in traced.graph.nodes)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            counted()
    assert counted.computed == 2


def test_replicas_do_not_share_what_they_keep(counted):
    replica = counted.kept._replicate_for_data_parallel()
    counted()
    assert not replica._entries


def test_autocast_and_inference_mode_know_their_own(counted):
    def product():
        return torch.nn.functional.linear(torch.ones(1, 3), counted.weight[None])

    results = []
    for _ in range(2):
        for dtype in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                results.append(counted.kept(product, CPU, counted.weight))
    assert [r.dtype for r in results[:3]] == [torch.float32, torch.bfloat16, torch.float16]
    assert all(a is b for a, b in zip(results[:3], results[3:], strict=True))
    with torch.inference_mode():
        first = counted("inference")
    assert not first.is_inference()
    assert counted("inference") is first


def test_weights_of_inference_mode_are_not_kept():
    with torch.inference_mode():
        counted = Counted().eval()
        counted()
        counted.weight.fill_(5.0)
        assert_close(counted(), torch.full((3,), 10.0))


def test_copies_files_and_state_dicts_hold_none_of_it(counted):
    counted()
    for twin in (copy.deepcopy(counted), pickle.loads(pickle.dumps(counted))):
        assert not twin.kept._entries
        twin.weight.fill_(5.0)
        assert_close(twin(), torch.full((3,), 10.0))
    assert_close(counted(), torch.full((3,), 2.0))
    assert list(counted.state_dict()) == ["weight"]


# ---- the model

WIDE = (64, 96)


@pytest.fixture(scope="module", params=["sine", "learned"])
def model(request):
    return random_detr(replace(SMALL, backbone="tiny", position_embedding=request.param))


def images(*size):
    return torch.stack(random_images(size))


def outputs(model, batch):
    """In inference, where things are kept, and with gradients, where nothing is."""
    with torch.no_grad():
        model(batch)
        kept = model(batch)
    return kept, model(batch)


def assert_follows(model, batch=None, **tolerance):
    kept, computed = outputs(model, images(*WIDE) if batch is None else batch)
    assert_close(kept, computed, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})
    return kept["pred_logits"]


def test_inference_equals_the_forward_pass_of_training(model):
    first = assert_follows(model)
    assert_follows(model, images(96, 64))
    assert_follows(model, random_images((40, 64), (64, 32)))
    assert torch.equal(assert_follows(model), first)


def test_every_weight_of_attention_counts(model):
    model = copy.deepcopy(model)
    before = assert_follows(model)
    transformer = model.transformer
    weights = [
        transformer.encoder.layers[0].self_attn.in_proj_weight,
        transformer.decoder.layers[1].self_attn.in_proj_weight,  # to the first all queries are 0
        transformer.decoder.layers[1].multihead_attn.in_proj_weight,
        transformer.decoder.layers[1].multihead_attn.in_proj_bias,
        model.query_embed.weight,
        *model.backbone[1].parameters(),
    ]
    for weight in weights:
        with torch.no_grad():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        after = assert_follows(model)
        assert not torch.equal(before, after)
        before = after


def test_autocast_can_be_switched(model):
    plain = assert_follows(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_follows(model, rtol=0.1, atol=0.1)
    assert torch.equal(assert_follows(model), plain)


def test_a_compiled_and_an_exported_model_follow_their_weights():
    model, batch = random_detr(replace(SMALL, backbone="tiny")), images(*WIDE)
    with torch.no_grad():
        model(batch)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(batch), model(batch), rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (batch,)).module()
        assert_close(exported(batch), model(batch), rtol=1e-4, atol=1e-5)
        model.transformer.decoder.layers[1].self_attn.in_proj_weight.mul_(2)
        assert_close(compiled(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_a_second_image_makes_no_positions_and_stacks_no_weights(model):
    batch = images(*WIDE)

    def calls(mode):
        with mode:
            model(batch)
            return Counter(dispatched(lambda: model(batch)))

    kept, computed = calls(torch.no_grad()), calls(torch.enable_grad())
    assert kept["aten.sin.default"] == 0
    # of the states, where with gradients those of weights and biases follow
    assert computed["aten.stack.default"] - kept["aten.stack.default"] >= 2
    # one product instead of two for each self-attention
    assert computed["aten.addmm.default"] - kept["aten.addmm.default"] == 1 + SMALL.dec_layers
