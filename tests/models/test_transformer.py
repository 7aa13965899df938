# SPDX-License-Identifier: Apache-2.0
"""The transformer against a restatement in functions, sequence first, one line a step."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_fast.models.attention import FUSED, REFERENCE
from detr_fast.models.padding import Padding
from detr_fast.models.transformer import Transformer
from tests.models.random_models import gradients, weighted_sum

GRID, WIDTH, QUERIES, BATCH = (3, 5), 24, 5, 3
CELLS = GRID[0] * GRID[1]


def build(attention=FUSED, pre_norm=False, heads=4, enc_layers=2, dec_layers=3, dropout=0.0):
    torch.manual_seed(0)
    transformer = Transformer(
        WIDTH, heads, enc_layers, dec_layers, 40, dropout, pre_norm, attention
    )
    for name, parameter in transformer.named_parameters():
        if parameter.dim() == 1:  # norms and biases must not be 1 and 0
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return transformer


def inputs(form="rect", seed=1):
    """Features of which the second image fills 2 x 4 cells and the third a single one."""
    torch.manual_seed(seed)
    features, position = torch.randn(2, BATCH, CELLS, WIDTH)
    rect = torch.tensor([GRID, (2, 4), (1, 1)], dtype=torch.int32)
    cells = torch.ones(BATCH, *GRID, dtype=torch.bool)
    for image, (height, width) in enumerate(rect):
        cells[image, :height, :width] = False
    padding = Padding(cells.flatten(1), *((rect, GRID[1]) if form == "rect" else ()))
    return features, position, padding, torch.randn(QUERIES, WIDTH)


def restated(model, heads, pre_norm, features, position, padding, queries):
    """The published algorithm, on (length, batch, channel) tensors and the weights of `model`."""
    weights = dict(model.named_parameters())

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(name, query, key, value, mask):
        module = torch.nn.MultiheadAttention(WIDTH, heads)
        prefix = f"{name}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        return torch.func.functional_call(module, own, (query, key, value, mask))[0]

    def feed(name, x):
        return linear(f"{name}.linear2", F.relu(linear(f"{name}.linear1", x)))

    x, position = features.transpose(0, 1), position.transpose(0, 1)
    place = queries[:, None].repeat(1, BATCH, 1)
    for i in range(len(model.encoder.layers)):
        name = f"encoder.layers.{i}"
        if pre_norm:
            y = norm(f"{name}.norm1", x)
            x = x + attend(f"{name}.self_attn", y + position, y + position, y, padding.cells)
            x = x + feed(name, norm(f"{name}.norm2", x))
        else:
            y = attend(f"{name}.self_attn", x + position, x + position, x, padding.cells)
            x = norm(f"{name}.norm1", x + y)
            x = norm(f"{name}.norm2", x + feed(name, x))
    memory = norm("encoder.norm", x) if pre_norm else x
    x, states = torch.zeros_like(place), []
    for i in range(len(model.decoder.layers)):
        name = f"decoder.layers.{i}"
        key = memory + position
        if pre_norm:
            y = norm(f"{name}.norm1", x)
            x = x + attend(f"{name}.self_attn", y + place, y + place, y, None)
            y = norm(f"{name}.norm2", x)
            x = x + attend(f"{name}.multihead_attn", y + place, key, memory, padding.cells)
            x = x + feed(name, norm(f"{name}.norm3", x))
        else:
            y = attend(f"{name}.self_attn", x + place, x + place, x, None)
            x = norm(f"{name}.norm1", x + y)
            y = attend(f"{name}.multihead_attn", x + place, key, memory, padding.cells)
            x = norm(f"{name}.norm2", x + y)
            x = norm(f"{name}.norm3", x + feed(name, x))
        states.append(norm("decoder.norm", x).transpose(0, 1))
    return torch.stack(states)


@pytest.mark.parametrize("attention", [FUSED, REFERENCE], ids=["fused", "reference"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize(
    ("heads", "enc_layers", "dec_layers"), [(4, 2, 3), (1, 0, 1), (24, 1, 2)], ids=str
)
@pytest.mark.parametrize("form", ["rect", "mask"])
def test_equals_restatement(form, attention, pre_norm, heads, enc_layers, dec_layers):
    model = build(attention, pre_norm, heads, enc_layers, dec_layers)
    states = model(*inputs(form))
    weighted_sum(states).backward()
    ours = gradients(model)
    model.zero_grad()
    expected = restated(model, heads, pre_norm, *inputs())
    weighted_sum(expected).backward()
    assert states.shape == (dec_layers, BATCH, QUERIES, WIDTH)
    assert_close(states, expected, rtol=1e-4, atol=1e-5)
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, grad in theirs.items():
        assert_close(ours[name], grad, rtol=1e-3, atol=2e-5, msg=name)


def test_last_layer_alone_is_the_last_of_all():
    model = build()
    assert torch.equal(model(*inputs(), every_layer=False), model(*inputs())[-1:])


@pytest.mark.parametrize("attention", [FUSED, REFERENCE], ids=["fused", "reference"])
@pytest.mark.parametrize("form", ["rect", "mask"])
def test_padded_cells_have_no_influence(form, attention):
    model = build(attention)
    features, position, padding, queries = inputs(form)
    expected = model(features, position, padding, queries)
    features[padding.cells] = 1e4
    position[padding.cells] = -50.0
    assert torch.equal(model(features, position, padding, queries), expected)
    assert not torch.equal(model(features, position, None, queries), expected)


@pytest.mark.parametrize("attention", [FUSED, REFERENCE], ids=["fused", "reference"])
@pytest.mark.parametrize("form", ["rect", "mask"])
def test_nan_at_padded_cells_reaches_neither_states_nor_gradients(form, attention):
    model = build(attention)
    features, position, padding, queries = inputs(form)
    results = []
    for value in (0.0, torch.nan):
        features[padding.cells] = value
        states = model(features, position, padding, queries)
        model.zero_grad()
        weighted_sum(states).backward()
        results.append((states, gradients(model)))
    assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("attention", [FUSED, REFERENCE], ids=["fused", "reference"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
def test_memory_is_zero_where_it_is_padding(pre_norm, attention):
    model = build(attention, pre_norm)
    features, position, padding, _ = inputs()
    memory = model.encoder(features, position, padding)
    assert not memory[padding.cells].any()
    assert (memory[~padding.cells] != 0).all()


def test_an_image_with_its_padding_is_the_image_alone():
    model = build()
    features, position, padding, queries = inputs()
    together = model(features, position, padding, queries)[:, 1]
    alone = [x[1:2].unflatten(1, GRID)[:, :2, :4].flatten(1, 2) for x in (features, position)]
    assert_close(together, model(*alone, None, queries)[:, 0])


def test_a_mask_without_padding_is_no_mask():
    model = build()
    features, position, padding, queries = inputs()
    expected = model(features, position, None, queries)
    nothing = torch.zeros_like(padding.cells)
    full = torch.tensor([GRID] * BATCH, dtype=torch.int32)
    for empty in (Padding(nothing), Padding(nothing, full, GRID[1])):
        assert_close(model(features, position, empty, queries), expected)


@pytest.mark.parametrize("attention", [FUSED, REFERENCE], ids=["fused", "reference"])
def test_dropout_in_training_alone(attention):
    model, given = build(attention, dropout=0.3), inputs()
    with torch.no_grad():
        assert not torch.equal(model(*given), model(*given))
        model.eval()
        assert torch.equal(model(*given), model(*given))
        assert_close(model(*given), restated(model, 4, False, *given), rtol=1e-4, atol=1e-5)


def test_attention_drops_weights_as_the_reference_does():
    """Over many draws both have the mean of no dropout, and the same spread."""
    torch.manual_seed(0)
    fast = FUSED.of_itself(8, 2, dropout=0.5)
    slow = REFERENCE.of_itself(8, 2, dropout=0.5)
    slow.load_state_dict(fast.state_dict())
    x, position = torch.randn(1, 4, 8).expand(20000, -1, -1), torch.randn(4, 8)
    with torch.no_grad():
        drawn_fast, drawn_slow = fast(x, position), slow(x, position)
        plain = fast.eval()(x[:1], position)[0]
    for drawn in (drawn_fast, drawn_slow):
        assert_close(drawn.mean(0), plain, atol=0.02, rtol=0)
    assert drawn_fast.std(0).min() > 0.01
    assert_close(drawn_fast.std(0), drawn_slow.std(0), atol=0.02, rtol=0.05)


def test_starts_xavier_uniform_and_alike_on_both_paths():
    states = []
    for attention in (FUSED, REFERENCE):
        torch.manual_seed(5)
        states.append(Transformer(64, 8, 2, 2, 128, 0.1, True, attention).state_dict())
    fast, reference = states
    assert list(fast) == list(reference)
    for name, value in fast.items():
        assert torch.equal(value, reference[name]), name
        if value.dim() > 1:
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.98 * bound < value.abs().max() <= bound, name
            assert_close(value.std().item(), bound / 3**0.5, rtol=0.05, atol=0)
        elif name.endswith("in_proj_bias"):
            assert not value.any()
