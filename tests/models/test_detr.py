# SPDX-License-Identifier: Apache-2.0
"""The assembled model: its keys, what it takes, what it returns, what it refuses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from detr_fast.data.batch import ImageBatch
from detr_fast.models import ModelConfig, build_detr
from detr_fast.models.backbone import ResNet
from tests.models.random_models import (
    SMALL,
    gradients,
    random_batch,
    random_detr,
    random_images,
    weighted_sum,
)


def attention_shapes(name):
    return {
        f"{name}.in_proj_weight": (768, 256),
        f"{name}.in_proj_bias": (768,),
        f"{name}.out_proj.weight": (256, 256),
        f"{name}.out_proj.bias": (256,),
    }


def linear_shapes(name, *weight_shape):
    return {f"{name}.weight": weight_shape, f"{name}.bias": weight_shape[:1]}


def norm_shapes(name, channels=256):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def published_shapes():
    """Keys and shapes of detr-r50-e632da11.pth, in the order of the original's modules."""
    torchvision = pytest.importorskip("torchvision")
    shapes = {}
    for i in range(6):
        layer = f"transformer.encoder.layers.{i}"
        shapes |= attention_shapes(f"{layer}.self_attn")
        shapes |= linear_shapes(f"{layer}.linear1", 2048, 256)
        shapes |= linear_shapes(f"{layer}.linear2", 256, 2048)
        shapes |= norm_shapes(f"{layer}.norm1") | norm_shapes(f"{layer}.norm2")
    for i in range(6):
        layer = f"transformer.decoder.layers.{i}"
        shapes |= attention_shapes(f"{layer}.self_attn")
        shapes |= attention_shapes(f"{layer}.multihead_attn")
        shapes |= linear_shapes(f"{layer}.linear1", 2048, 256)
        shapes |= linear_shapes(f"{layer}.linear2", 256, 2048)
        for n in (1, 2, 3):
            shapes |= norm_shapes(f"{layer}.norm{n}")
    shapes |= norm_shapes("transformer.decoder.norm")
    shapes |= linear_shapes("class_embed", 92, 256)
    shapes |= linear_shapes("bbox_embed.layers.0", 256, 256)
    shapes |= linear_shapes("bbox_embed.layers.1", 256, 256)
    shapes |= linear_shapes("bbox_embed.layers.2", 4, 256)
    shapes["query_embed.weight"] = (100, 256)
    shapes |= linear_shapes("input_proj", 256, 2048, 1, 1)
    for key, value in torchvision.models.resnet50(weights=None).state_dict().items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            shapes[f"backbone.0.body.{key}"] = tuple(value.shape)
    return shapes


@pytest.fixture(scope="module")
def resnet50():
    return random_detr(ModelConfig())


def test_state_dict_is_that_of_the_published_file(resnet50):
    """The order too: optimizer states in checkpoints of the original go by it."""
    expected = published_shapes()
    assert len(expected) == 458
    state = resnet50.state_dict()
    assert [(k, tuple(v.shape)) for k, v in state.items()] == list(expected.items())
    assert sum(v.numel() for v in state.values()) == 41_631_008
    assert sum(p.numel() for p in resnet50.parameters() if p.requires_grad) == 41_302_368


def test_pre_norm_and_learned_positions_add_their_keys():
    plain = build_detr(SMALL).state_dict()
    other = build_detr(replace(SMALL, pre_norm=True, position_embedding="learned")).state_dict()
    assert {k: tuple(v.shape) for k, v in other.items() if k not in plain} == {
        "transformer.encoder.norm.weight": (32,),
        "transformer.encoder.norm.bias": (32,),
        "backbone.1.row_embed.weight": (50, 16),
        "backbone.1.col_embed.weight": (50, 16),
    }
    assert plain.keys() <= other.keys()


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("position", ["sine", "learned"])
def test_fast_and_reference_path_agree(pre_norm, position):
    config = replace(SMALL, pre_norm=pre_norm, position_embedding=position)
    batch = random_batch((64, 96), (50, 33))
    results = []
    for folded in (True, False):
        model = random_detr(config, folded=folded)
        outputs = model(batch)
        layers = [outputs, *outputs["aux_outputs"]]
        weighted_sum(*(x for o in layers for x in (o["pred_logits"], o["pred_boxes"]))).backward()
        results.append((outputs, gradients(model)))
    (fast, fast_grads), (reference, reference_grads) = results
    assert_close(fast, reference, rtol=1e-4, atol=1e-5)
    assert fast_grads.keys() == reference_grads.keys()
    for name, grad in reference_grads.items():
        scale = grad.abs().max().item()
        assert_close(fast_grads[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_outputs_have_the_form_of_the_original():
    outputs = random_detr()(random_batch((40, 64), (64, 32)))
    assert list(outputs) == ["pred_logits", "pred_boxes", "aux_outputs"]
    assert len(outputs["aux_outputs"]) == SMALL.dec_layers - 1
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 7, 6)
        assert layer["pred_boxes"].shape == (2, 7, 4)
        assert 0 <= layer["pred_boxes"].min() < layer["pred_boxes"].max() <= 1
    assert list(outputs["aux_outputs"][0]) == ["pred_logits", "pred_boxes"]


def test_aux_outputs_come_from_the_same_heads():
    """The first layer's outputs are those of a model that ends there."""
    model = random_detr()
    short = random_detr(replace(SMALL, dec_layers=1, aux_loss=False))
    own = short.state_dict()
    short.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    batch = random_batch((40, 64), (64, 32))
    assert_close(model(batch)["aux_outputs"][0], short(batch))


def test_without_aux_loss_there_are_no_aux_outputs():
    model, silent = random_detr(), random_detr(replace(SMALL, aux_loss=False))
    batch = random_batch((40, 64), (64, 32))
    outputs = model(batch)
    del outputs["aux_outputs"]
    assert_close(silent(batch), outputs)


def test_forms_of_input_agree():
    model = random_detr()
    images = random_images((40, 64), (40, 64))
    stacked = torch.stack(images)
    expected = model(stacked)
    for same in (images, tuple(images), ImageBatch(stacked)):
        assert_close(model(same), expected, rtol=0, atol=0)
    full = torch.tensor([(40, 64)] * 2, dtype=torch.int32)
    mask = torch.zeros(2, 40, 64, dtype=torch.bool)
    assert_close(model(ImageBatch(stacked, full)), expected)
    assert_close(model(SimpleNamespace(tensors=stacked, mask=mask)), expected)


def test_list_of_sizes_is_padded_and_masked():
    model = random_detr()
    images = random_images((40, 64), (64, 32))
    batch = SimpleNamespace(
        tensors=torch.zeros(2, 3, 64, 64), mask=torch.ones(2, 64, 64, dtype=torch.bool)
    )
    for i, image in enumerate(images):
        _, height, width = image.shape
        batch.tensors[i, :, :height, :width] = image
        batch.mask[i, :height, :width] = False
    outputs = model(images)
    assert_close(outputs, model(random_batch((40, 64), (64, 32))), rtol=0, atol=0)
    assert_close(outputs, model(batch))
    unmasked = model(batch.tensors)
    assert not torch.allclose(outputs["pred_logits"], unmasked["pred_logits"], rtol=1e-3)


def test_batched_equals_single_without_padding():
    model = random_detr()
    images = random_images((64, 96), (64, 96), (64, 96))
    together = model(images)
    for i, image in enumerate(images):
        alone = model([image])
        for name in ("pred_logits", "pred_boxes"):
            assert_close(together[name][i], alone[name][0], rtol=1e-4, atol=1e-5)


def test_padding_does_not_move_an_image_among_its_neighbours():
    """Which other image made the batch larger does not matter, nor its place in the batch."""
    model = random_detr()
    small, large, other = random_images((40, 50), (96, 64), (96, 64))
    first = model([small, large])
    second = model([other, small])
    assert_close(first["pred_logits"][0], second["pred_logits"][1], rtol=1e-4, atol=1e-5)
    assert_close(first["pred_boxes"][0], second["pred_boxes"][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folded", [True, False], ids=["fast", "reference"])
def test_odd_sizes_give_finite_boxes(folded):
    model = random_detr(replace(SMALL, dilation=True), folded=folded)
    for sizes in ([(1, 1)], [(70, 1)], [(1, 70), (33, 47)], [(1, 1), (65, 97), (1, 97)]):
        outputs = model(random_images(*sizes))
        assert outputs["pred_boxes"].shape == (len(sizes), 7, 4)
        assert outputs["pred_boxes"].isfinite().all()
        assert outputs["pred_logits"].isfinite().all()


@pytest.mark.parametrize("form", ["sizes", "mask"])
@pytest.mark.parametrize("folded", [True, False], ids=["fast", "reference"])
def test_an_image_that_is_all_padding_gives_no_nan(folded, form):
    model = random_detr(folded=folded)
    tensors = random_batch((64, 64), (64, 64)).tensors
    expected = model(tensors)
    batch = ImageBatch(tensors, torch.tensor([(64, 64), (0, 64)], dtype=torch.int32))
    if form == "mask":
        batch = SimpleNamespace(tensors=batch.tensors, mask=batch.mask)
    outputs = model(batch)
    assert_close(outputs["pred_boxes"][0], expected["pred_boxes"][0])
    weighted_sum(outputs["pred_logits"], outputs["pred_boxes"]).backward()
    assert outputs["pred_logits"].isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 8, 8), ValueError, r"\(B, 3, H, W\), got \(3, 8, 8\): put a single image"),
        (torch.rand(1, 1, 8, 8), ValueError, r"images: expected .*, got \(1, 1, 8, 8\)"),
        (torch.rand(1, 8, 8, 3), ValueError, r"got \(1, 8, 8, 3\)"),
        (torch.rand(0, 3, 8, 8), ValueError, r"got \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"got torch\.uint8: .*normalize"),
        ([torch.rand(3, 8, 8), torch.rand(8, 8)], ValueError, r"images\[1\]: .*got \(8, 8\)"),
        ([torch.rand(3, 8, 8), torch.rand(3, 0, 8)], ValueError, r"images\[1\]: .*\(3, 0, 8\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)], TypeError, r"images\[0\]: .*torch\.int64"),
        ([], ValueError, "at least one image"),
        ("cat.jpg", TypeError, "got str"),
        ([None], TypeError, r"images\[0\]: .*got NoneType"),
        (
            SimpleNamespace(
                tensors=torch.rand(2, 3, 8, 8), mask=torch.zeros(2, 8, 9, dtype=torch.bool)
            ),
            ValueError,
            r"mask: expected shape \(2, 8, 8\), got \(2, 8, 9\)",
        ),
        (
            SimpleNamespace(tensors=torch.rand(2, 3, 8, 8), mask=torch.zeros(2, 8, 8)),
            TypeError,
            r"mask: expected torch\.bool, .*got torch\.float32",
        ),
        (
            ImageBatch(torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)),
            TypeError,
            r"sizes: expected torch\.int32, got torch\.bool",
        ),
        (
            ImageBatch(torch.rand(2, 3, 8, 8), torch.ones(1, 2, dtype=torch.int32)),
            ValueError,
            r"sizes: expected shape \(2, 2\), got \(1, 2\)",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(small_model, images, error, message):
    with pytest.raises(error, match=message):
        small_model(images)


@pytest.fixture(scope="module")
def small_model():
    return random_detr()


def test_boxes_stay_float32_under_autocast(small_model):
    batch = random_batch((64, 96), (50, 33))
    expected = small_model(batch)
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        for layer in (*small_model.bbox_embed.layers, small_model.input_proj)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = small_model(batch)
    for hook in hooks:
        hook.remove()
    assert seen == [torch.bfloat16, *[torch.float32] * 3]  # the projection, then the box head
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_boxes"].dtype == layer["pred_logits"].dtype == torch.float32
    assert_close(outputs["pred_boxes"], expected["pred_boxes"], atol=0.05, rtol=0)
    assert_close(outputs["pred_logits"], expected["pred_logits"], atol=0.2, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_of_another_dtype(dtype):
    expected = random_detr()(random_batch((64, 96), (50, 33)))
    model = random_detr().to(dtype)
    batch = random_batch((64, 96), (50, 33))
    outputs = model(ImageBatch(batch.tensors.to(dtype), batch.sizes))
    assert outputs["pred_boxes"].dtype == torch.promote_types(dtype, torch.float32)
    boxes = outputs["pred_boxes"].float()
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert_close(boxes, expected["pred_boxes"], atol=tolerance, rtol=0)


def test_channels_last_gives_the_same(small_model):
    images = torch.stack(random_images((64, 96), (64, 96)))
    expected = small_model(images)
    model = random_detr().to(memory_format=torch.channels_last)
    outputs = model(images.to(memory_format=torch.channels_last))
    assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["tensor", "batch"])
def test_compiles_without_graph_break(form):
    model = random_detr().train()
    model.backbone[0].body = ResNet((1, 1, 1, 1), dilation=False, folded=True)
    batch = random_batch((32, 64), (32, 40))
    images = batch.tensors if form == "tensor" else batch
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        outputs = run(images)
        weighted_sum(outputs["pred_logits"], outputs["pred_boxes"]).backward()
        results.append((outputs, gradients(model)))
    assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for name, grad in results[0][1].items():
        scale = grad.abs().max().item()
        assert_close(results[1][1][name], grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
