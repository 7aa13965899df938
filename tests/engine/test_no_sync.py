# SPDX-License-Identifier: Apache-2.0
"""A training step never waits for the device: on a GPU, and by its operators without one."""

import importlib
from collections import Counter
from dataclasses import replace

import pytest
import torch

from detr_fast.command_line import parse
from detr_fast.config import configure
from detr_fast.criterion import SetCriterion, weighted_losses
from detr_fast.data.batch import pad_images
from detr_fast.engine import build
from detr_fast.engine.batch import Batch
from detr_fast.engine.log import MetricLogger
from detr_fast.engine.metrics import StepMetrics
from detr_fast.engine.optim import Learner, training_mode
from detr_fast.engine.precision import Precision
from detr_fast.engine.step import TrainingStep
from detr_fast.matcher.packing import Targets
from detr_fast.models.detr import build_detr
from tests.engine.sync_guard import WaitsForTheDeviceError, no_sync

CLASSES = 4
RECIPES = {
    "default": "",
    "original model": "--model detr_resnet50 --backbone_weights none --dropout 0.1",
    "bfloat16": "--model detr_resnet50 --backbone_weights none --amp bf16",
    "float16": "--model detr_resnet50 --backbone_weights none --amp fp16 --accumulate_steps 2",
    "all options": "--accumulate_steps 2 --warmup_steps 9 --ema_decay 0.99 --clip_max_norm 0",
}


@pytest.fixture
def meta(meta, monkeypatch):
    """The meta device; the constructor of the optimizer does not know it, its operators do."""
    optimizer = importlib.import_module("torch.optim.optimizer")  # torch.optim hides its name
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return meta


class Training:
    """What `train_one_epoch` does with each of its batches, on batches that are always the same."""

    def __init__(self, device, flags="", *, layers=2, images=2, height=64, static_gradients=False):
        self.device, self.batch = device, 0
        flags = f"--dataset_file shapes --dec_layers {layers} {flags}"
        config = configure(parse("", "", flags.split()))
        model = build_detr(config.model_config(CLASSES)).to(device)
        training_mode(model)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.amp)
        precision = Precision(device, dtype)  # what the flags say, on the meta device, too
        self.learner = Learner(
            model, config, scaled=precision.scales_loss, static_gradients=static_gradients
        )
        self.criterion = build.build_criterion(config, CLASSES).to(device)
        self.train = TrainingStep(self.learner, self.criterion, precision)
        self.metrics = StepMetrics(MetricLogger(), lateness=1)
        sizes = [(3, height - 16 * (i % 2), 64) for i in range(images)]
        self.images = pad_images([torch.rand(size) for size in sizes])
        self.targets = [
            {"labels": torch.arange(i % 4), "boxes": torch.full((i % 4, 4), 0.5)}
            for i in range(1, images + 1)
        ]
        if device.type == "cuda":
            self.images = type(self.images)(*(t.pin_memory() for t in self.images))

    def step(self):
        self.submit(self.packed())

    def packed(self):
        packed = Targets.from_list(self.targets)
        self.criterion.check_labels(packed)
        return packed.pin_memory() if self.device.type == "cuda" else packed

    def submit(self, packed):
        images, targets = (x.to(self.device, non_blocking=True) for x in (self.images, packed))
        values = self.train(Batch(images, targets, []), self.batch, 100)
        self.metrics.add(self.batch, [0], values)
        self.batch += 1

    def guarded_step(self):
        packed = self.packed()
        with no_sync() as calls:
            self.submit(packed)
        return calls


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_does_not_wait_for_a_gpu(recipe):
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none")
    training = Training(torch.device("cuda"), RECIPES[recipe])
    for _ in range(4):  # libraries load and moments begin
        training.step()
    training.metrics.turn()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the second line of the log reads what the first one has sent
            training.step()
            training.step()
            training.metrics.turn()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.metrics.finish()
    assert training.metrics.log.meters["loss"].count == 8
    assert training.learner.skipped == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_operator_of_a_step_waits(recipe, meta):
    training = Training(meta, RECIPES[recipe])
    training.step()  # constants travel once
    calls = Counter()
    for _ in range(4):
        calls += training.guarded_step()
    assert calls[torch.ops.detr_fast.set_loss] == 4
    assert calls[torch.ops.detr_fast.hungarian_match] == 4
    assert calls[torch.ops.aten._fused_adamw_] >= 2
    half = "--amp" in RECIPES[recipe]
    assert (calls[torch.ops.detr_fast.attention] > 0) == half  # heads of 32 columns
    scaled = recipe == "float16"
    assert calls[torch.ops.aten._amp_update_scale_] == 2 * scaled
    if scaled:
        assert training.learner.scale.value.device == meta


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("static", [False, True])
def test_an_update_launches_nothing_for_each_parameter(amp, static, meta, monkeypatch):
    """Norm, clipping, unscaling, AdamW and zeroing go over lists of them."""
    # as on CUDA; of the meta device torch's clipping does not know that it takes lists
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True)
    flags = f"--model detr_resnet50 --backbone_weights none --enc_layers 1 --amp {amp}"
    training = Training(meta, flags, static_gradients=static)
    training.step()
    learner = training.learner
    parameters = sum(p.requires_grad for p in learner.model.parameters())
    outputs = learner.model(training.images.to(meta))
    loss = outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()
    with no_sync() as zeroing:
        learner.begin(1, 100)
    learner.backward(loss)
    with no_sync() as finishing:
        learner.finish()
    update = zeroing + finishing
    assert parameters > 100
    assert sum(update.values()) < 50, update
    for op in (torch.ops.aten._foreach_norm, torch.ops.aten._foreach_mul_):
        assert 1 <= update[op] <= 2, op
    assert update[torch.ops.aten._fused_adamw_] == 2  # groups
    assert update[torch.ops.aten._foreach_zero_] == static


PLANTED = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "__bool__": lambda x: bool(x.sum() > 0),
    "__float__": lambda x: float(x.sum()),
    "__int__": lambda x: int(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x.flatten()[x.flatten() > 0],
    "written mask": lambda x: x.detach().clone().index_put_((x > 0,), x.new_zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.detach().unique(),
    "torch.tensor": lambda x: torch.tensor([1.0], device=x.device),
    "torch.as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "to the device": lambda x: torch.zeros(3).to(x.device),
    "from the device": lambda x: x.to("cpu"),
    "copied into": lambda x: torch.empty_like(x).copy_(torch.zeros(x.shape)),
    "index on the host": lambda x: x.flatten()[torch.arange(2)],
    "item of a CPU tensor": lambda x: torch.zeros(1).item(),
    "tolist of a CPU tensor": lambda x: torch.zeros(1).tolist(),
    "cpu of a CPU tensor": lambda x: torch.zeros(1).cpu(),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_guard_finds_what_waits_in_the_model(planted, meta):
    training = Training(meta)
    training.step()
    training.learner.model.class_embed.register_forward_hook(
        lambda module, args, output: PLANTED[planted](output) and None
    )
    with pytest.raises(WaitsForTheDeviceError):
        training.guarded_step()


@pytest.mark.parametrize("planted", ["item", "mask", "torch.tensor"])
def test_the_guard_finds_what_waits_in_the_criterion(planted, meta):
    class Planted(SetCriterion):
        def forward(self, outputs, targets):
            losses = super().forward(outputs, targets)
            PLANTED[planted](losses["loss_ce"].reshape(1))
            return losses

    training = Training(meta)
    training.step()
    training.criterion.__class__ = Planted
    with pytest.raises(WaitsForTheDeviceError):
        training.guarded_step()


@pytest.mark.parametrize("planted", ["item", "mask", "torch.tensor"])
def test_the_guard_finds_what_waits_in_the_backward_pass(planted, meta):
    training = Training(meta)
    training.step()
    training.learner.model.class_embed.weight.register_hook(
        lambda gradient: PLANTED[planted](gradient) and None
    )
    with pytest.raises(WaitsForTheDeviceError):
        training.guarded_step()


def test_what_the_loop_adds_does_not_grow_with_layers_or_images(meta):
    """Total, metrics and optimizer; the parameters are as many in both."""

    def added(layers, images):
        training = Training(meta, layers=2, images=images)
        learner, parameters = training.learner, list(training.learner.model.parameters())
        learner.config = replace(learner.config, clip_max_norm=0.1)
        suffixes = ["", *(f"_{i}" for i in range(layers - 1))]
        table = torch.zeros(len(suffixes), 3, device=meta)
        names = [[f"{n}{s}" for n in ("loss_ce", "loss_bbox", "loss_giou")] for s in suffixes]
        losses = {
            name: value
            for row, of_layer in zip(names, table.unbind(), strict=True)
            for name, value in zip(row, of_layer.unbind(), strict=True)
        }
        weights = dict.fromkeys(losses, 2.0)
        weighted_losses(losses, weights)  # the weights travel once
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with no_sync() as calls:
            total, terms = weighted_losses(losses, weights)
            training.metrics.add(0, list(range(images)), {"loss": total, **terms})
            learner._losses += total
            learner.finish()
        return calls

    few, many = added(2, 2), added(6, 16)
    assert few == many
    assert few[torch.ops.aten._fused_adamw_] >= 1
