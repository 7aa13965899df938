# SPDX-License-Identifier: Apache-2.0
"""The small model of the default run: its shapes, its start, and that it learns."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast.criterion import SetCriterion, loss_weights
from detr_fast.data.shapes import SIDE, ShapesDetection
from detr_fast.matcher import HungarianMatcher
from detr_fast.models import detr_tiny
from detr_fast.models.tiny import DETR_TINY, ConvBackbone, Coordinates, place_queries


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = detr_tiny()
    place_queries(model)
    return model


def batch(count):
    data = ShapesDetection("train", augment=False, length=count)
    images, targets = zip(*(data[i] for i in range(count)), strict=True)
    return torch.stack(images), list(targets)


def attention_to_cells(model, images, layer):
    """Weights (B, heads, Q, 8, 8) with which the placed queries of a layer attend to the image."""
    position = model.backbone[1](torch.empty(1, 0, 8, 8), None)
    features = model.input_proj(model.backbone[0](images)).flatten(2).transpose(1, 2)
    keys = model.transformer.encoder(features, position, None) + position
    attention = model.transformer.decoder.layers[layer].multihead_attn
    states = torch.zeros(len(images), model.config.num_queries, model.config.hidden_dim)
    queries = states + model.query_embed.weight
    one_by_one = torch.nn.MultiheadAttention(model.config.hidden_dim, model.config.nheads)
    one_by_one.load_state_dict(attention.state_dict())
    arguments = (x.transpose(0, 1) for x in (queries, keys, keys))
    weights = one_by_one(*arguments, average_attn_weights=False)[1]
    return weights.unflatten(-1, (8, 8))


def test_outputs(model):
    outputs = model(torch.randn(2, 3, SIDE, SIDE))
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == DETR_TINY.dec_layers
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 16, ShapesDetection.num_classes + 1)
        assert layer["pred_boxes"].shape == (2, 16, 4)
        assert 0 <= layer["pred_boxes"].min() <= layer["pred_boxes"].max() <= 1


def test_size_and_names(model):
    assert sum(p.numel() for p in model.parameters()) == 929_977
    backbone = [name for name, _ in model.named_parameters() if "backbone" in name]
    assert backbone
    assert all(name.startswith("backbone.0.body.") for name in backbone)
    assert model.config.num_classes == ShapesDetection.num_classes


def test_features_are_at_stride_16():
    backbone = ConvBackbone()
    features = backbone(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, backbone.num_channels, 4, 6)


def test_coordinates_are_those_of_the_cell_centres():
    out = Coordinates()(torch.zeros(2, 5, 4, 8))
    assert out.shape == (2, 7, 4, 8)
    columns = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert_close(out[:, 5], columns.expand(2, 4, 8))
    assert_close(out[:, 6], torch.tensor([-3.0, -1.0, 1.0, 3.0])[:, None].expand(2, 4, 8))


def test_batch_norm_sees_one_image_as_it_sees_many(model):
    model.eval()
    images = torch.randn(3, 3, SIDE, SIDE)
    together = model(images)["pred_boxes"]
    apart = torch.cat([model(image[None])["pred_boxes"] for image in images])
    assert_close(together, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", range(DETR_TINY.dec_layers))
def test_queries_start_at_places_of_their_own(model, layer):
    """Query 4 * i + j of the 4 x 4 attends to one cell, the same in every image."""
    with torch.no_grad():
        weights = attention_to_cells(model.eval(), batch(2)[0], layer)
    for query in range(16):
        own = weights[:, :, query, 2 * (query // 4) + 1, 2 * (query % 4) + 1]
        assert own.min() > 0.6
    assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)  # whatever the image shows


@pytest.mark.parametrize("changes", [{"pre_norm": False}, {"position_embedding": "learned"}])
def test_other_models_keep_their_start(changes):
    model = detr_tiny(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    place_queries(model)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [{"num_queries": 7}, {"num_queries": 1}, {"nheads": 1}, {"hidden_dim": 64}, {"enc_layers": 1}],
    ids=str,
)
def test_places_of_other_sizes(changes):
    """Places differ from each other, and padding and image sizes do not matter."""
    model = detr_tiny(**changes).eval()
    place_queries(model)
    places = model.query_embed.weight
    assert len(places.unique(dim=0)) == model.config.num_queries
    boxes = model([torch.randn(3, 128, 128), torch.randn(3, 70, 90)])["pred_boxes"]
    assert boxes.isfinite().all()


def test_every_parameter_gets_a_gradient_and_the_loss_falls(model):
    """30 steps on two images more than halve the loss."""
    images, targets = batch(2)
    weights = loss_weights(DETR_TINY.dec_layers)
    criterion = SetCriterion(
        DETR_TINY.num_classes, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes"]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in range(30):
        losses = criterion(model(images), targets)
        loss = sum(losses[name] * weight for name, weight in weights.items())
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # in step 0, branches that start at zero hold back their inputs
            without = [name for name, p in model.named_parameters() if not p.grad.any()]
            # it scales the zeros that queries start from
            assert without == ["transformer.decoder.layers.0.norm1.weight"]
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 2
