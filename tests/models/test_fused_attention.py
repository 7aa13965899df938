# SPDX-License-Identifier: Apache-2.0
"""A DETR whose attention runs in the fused kernels, against plain torch."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops
from detr_fast.data.batch import ImageBatch, pad_images
from detr_fast.engine.dispatched import dispatched
from detr_fast.models.padding import padding_of_sizes
from tests.models.random_models import SMALL, gradients, random_detr, random_images, weighted_sum

# heads of 32 columns; the small backbone has cells of 16 pixels
CONFIG = replace(
    SMALL,
    backbone="tiny",
    hidden_dim=64,
    nheads=2,
    dec_layers=1,
    aux_loss=False,
)
SIZES = [(64, 80), (40, 33)]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def results(model, batch):
    """Predictions and gradients, and the predictions of inference."""
    with torch.no_grad():
        inference = model(batch)["pred_logits"]
    model.zero_grad()
    outputs = model(batch)
    weighted_sum(outputs["pred_logits"], outputs["pred_boxes"]).backward()
    return {"inference": inference, **outputs, **gradients(model)}


def runs_fused(device, dtype):
    q = torch.empty(1, 1, 1, 32, device=device, dtype=dtype)
    return ops.backend("attention", q, q, q)[0] == "fused"


@HALVES
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1]], ids=["padded", "single"])
def test_predictions_and_gradients_are_as_exact_as_those_of_torch(device, sizes, dtype):
    model, batch = random_detr(CONFIG).to(device), pad_images(random_images(*sizes)).to(device)
    exact = results(model, batch)
    with torch.autocast(device.type, dtype):
        calls = dispatched(lambda: model(batch))
        ours = results(model, batch)
        with ops.use_reference():
            theirs = results(model, batch)
    attentions = CONFIG.enc_layers + 2 * CONFIG.dec_layers
    fused = attentions if runs_fused(device, dtype) else 0
    assert calls.count("detr_fast.attention.default") == fused
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, value in exact.items():
        error, of_torch = ((found[name].float() - value).norm() for found in (ours, theirs))
        assert error <= 2 * of_torch + 1e-3 * value.norm() + 1e-6, name


def test_an_image_alone_and_in_a_padded_batch_give_the_same(device):
    model, images = random_detr(CONFIG).to(device).eval(), random_images(*SIZES)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        together = model([image.to(device) for image in images])
        for i, image in enumerate(images):
            padded = torch.zeros(3, 64, 80)
            padded[:, : image.shape[1], : image.shape[2]] = image
            size = torch.tensor([image.shape[1:]], dtype=torch.int32)
            alone = model(ImageBatch(padded[None], size).to(device))
            for name in ("pred_logits", "pred_boxes"):
                assert_close(alone[name][0], together[name][i], rtol=0, atol=2e-2)


def test_nan_at_padded_cells_reaches_no_prediction(device):
    model = random_detr(CONFIG).to(device)
    batch = pad_images(random_images(*SIZES)).to(device)

    def with_features_of(value):
        def spoil(module, inputs, features):
            sizes, pixels, grid = batch.sizes, batch.tensors.shape[-2:], features.shape[-2:]
            cells = padding_of_sizes(sizes, pixels, grid).cells.unflatten(1, grid)
            return features.masked_fill(cells[:, None], value)

        hook = model.input_proj.register_forward_hook(spoil)
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(batch)
        hook.remove()
        return outputs

    spoilt, clean = with_features_of(torch.nan), with_features_of(0.0)
    assert torch.equal(spoilt["pred_logits"], clean["pred_logits"])
    assert torch.equal(spoilt["pred_boxes"], clean["pred_boxes"])
    assert clean["pred_boxes"].isfinite().all()
