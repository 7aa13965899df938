# SPDX-License-Identifier: Apache-2.0
"""What --amp chooses, what stays float32 whatever it chooses, and that `off` is the original."""

from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast import cli, ops
from detr_fast.config import UsageError
from detr_fast.data.batch import ImageBatch
from detr_fast.engine import build, evaluate, precision, train
from detr_fast.engine.loss_scale import LossScale
from detr_fast.engine.optim import Learner
from detr_fast.engine.precision import Precision
from detr_fast.engine.step import TrainingStep
from detr_fast.matcher.packing import Targets
from detr_fast.models import ModelConfig
from detr_fast.models.checkpoint import read_checkpoint
from detr_fast.models.position_encoding import PositionEncodingSine
from tests.engine import test_train
from tests.engine.test_train import config, fit
from tests.models.random_models import SMALL, random_batch, random_detr

few_images = test_train.few_images
CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
aten = torch.ops.aten


@pytest.fixture(params=[True, False], ids=["native", "converted"])
def native(request, monkeypatch):
    """A CPU with instructions for 16 bits, and one without."""
    monkeypatch.setattr(precision, "_cpu_computes_in", lambda dtype: request.param)
    return request.param


def gpu_of(monkeypatch, capability):
    """A GPU as torch tells of it."""
    native = capability >= (8, 0)
    known = {
        "device": lambda device: nullcontext(),
        "get_device_capability": lambda: capability,
        "is_bf16_supported": lambda including_emulation=True: native or including_emulation,
    }
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return torch.device("cuda", 0)


def of(flags, device=CPU, *, training=True):
    return Precision.of(config(flags), device, training=training)


def test_auto_trains_in_bfloat16_where_the_cpu_computes_in_it(native):
    found = of("")
    assert found.dtype == (BF16 if native else None)
    computes = "computes in it" if native else "has no bfloat16"
    name = "bfloat16" if native else "float32"
    assert str(found) == f"{name} (--amp auto: this CPU {computes})"
    assert found.images == (BF16 if native else FP32)
    with found.autocast():
        assert torch.is_autocast_enabled("cpu") == native


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), BF16, "this GPU computes in it"),
        ((8, 0), BF16, "this GPU computes in it"),
        ((7, 5), None, "this GPU has no bfloat16; --amp fp16 is faster"),
        ((6, 1), None, "this GPU has no bfloat16"),
    ],
    ids=str,
)
def test_auto_goes_by_the_capability_of_a_gpu(monkeypatch, capability, dtype, reason):
    found = of("", gpu_of(monkeypatch, capability))
    assert (found.dtype, found.reason) == (dtype, f"--amp auto: {reason}")


def test_auto_knows_no_other_device():
    assert of("", torch.device("mps")).dtype is None


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)], ids=str)
def test_an_evaluation_is_float32_unless_asked(device, monkeypatch, native):
    monkeypatch.setattr(precision, "_why_not", lambda device, dtype: "")
    assert of("", device, training=False).dtype is None
    assert of("--amp off", device, training=False).dtype is None
    assert of("--amp bf16", device, training=False).dtype == BF16
    assert of("--amp fp16", device, training=False).dtype == FP16


def test_what_is_asked_for_is_taken_and_slowness_said(native):
    assert str(of("--amp off")) == "float32 (--amp off)"
    slow = "" if native else ": slow, this CPU has no such arithmetic"
    assert str(of("--amp bf16")) == f"bfloat16 (--amp bf16{slow})"
    assert str(of("--amp fp16")) == f"float16 (--amp fp16{slow})"
    assert [of(f"--amp {name}").scales_loss for name in ("off", "bf16", "fp16")] == [0, 0, 1]


def test_the_reference_back_end_is_float32(native):
    assert of("--backend reference --amp auto").dtype is None


def test_a_device_without_autocast_is_a_mistake():
    with pytest.raises(UsageError, match=r"--amp bf16: torch has no autocast for meta: try --amp"):
        of("--amp bf16", torch.device("meta"))


def test_a_device_that_cannot_is_a_mistake(monkeypatch, capsys):
    def cannot(*_):
        raise RuntimeError('"conv" not implemented for Half\nC++ frames')

    monkeypatch.setattr(precision.F, "conv2d", cannot)
    assert fit("--amp fp16 --epochs 1 --output_dir ''") == 2
    assert (
        'error: --amp fp16: cpu cannot compute in torch.float16 ("conv" not implemented for Half): '
        "try --amp auto or --amp off" in capsys.readouterr().err
    )


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
@pytest.mark.parametrize("supported", [True, False])
def test_native_arithmetic_is_asked_of_torch(monkeypatch, machine, supported):
    """Of oneDNN on Arm; its answer on x86 says that it can convert. Queries may be missing."""
    x86 = machine in ("x86_64", "AMD64")
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported or x86, raising=False
    )
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.setattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: supported or not x86, raising=False
    )
    assert precision._cpu_computes_in(BF16) == supported
    if x86:
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
        assert not precision._cpu_computes_in(BF16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision._cpu_computes_in(BF16)


@pytest.mark.parametrize(
    ("flags", "expected"), [("", (BF16, None)), ("--amp bf16", (BF16, BF16))], ids=["auto", "bf16"]
)
def test_a_run_says_and_takes_it(tmp_path, capsys, monkeypatch, flags, expected):
    monkeypatch.setattr(precision, "_cpu_computes_in", lambda dtype: True)
    seen = []

    def spy(*args, infer, **options):
        seen.append(infer.precision.dtype)
        return evaluate.evaluate(*args, infer=infer, **options)

    monkeypatch.setattr(train, "evaluate", spy)
    call, ran = TrainingStep.forward_backward, set()

    def step(self, *args):
        ran.add(self.precision.dtype)
        return call(self, *args)

    monkeypatch.setattr(TrainingStep, "forward_backward", step)
    assert fit(f"--epochs 1 --output_dir {tmp_path} {flags}") == 0
    assert (ran, seen) == ({expected[0]}, [expected[1]])
    printed = capsys.readouterr().out
    assert "precision: bfloat16 (--amp " in printed
    assert f"; evaluation: {'bfloat16' if flags else 'float32'} (--amp " in printed
    line = f"--resume {tmp_path}/checkpoint.pth --device cpu"
    assert cli.evaluate(line.split()) == 0
    assert "precision: float32 (--amp auto)\n" in capsys.readouterr().out
    assert cli.evaluate(f"{line} --amp bf16".split()) == 0
    assert "precision: bfloat16 (--amp bf16)\n" in capsys.readouterr().out


class Dtypes(TorchDispatchMode):
    """The dtypes of the floating tensors that operators take and return, by operator."""

    def __init__(self):
        super().__init__()
        self.taken, self.returned = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        for seen, values in ((self.taken, args), (self.returned, [out])):
            leaves = torch.utils._pytree.tree_leaves(values)
            dtypes = [x.dtype for x in leaves if isinstance(x, torch.Tensor)]
            seen.setdefault(packet, []).append([d for d in dtypes if d.is_floating_point])
        return out


def step_in(dtype, model=None):
    model = model or random_detr()
    flags = config("--dec_layers 2")
    learner = Learner(model.train(), flags, scaled=dtype == FP16)
    criterion = build.build_criterion(flags, SMALL.num_classes)
    return TrainingStep(learner, criterion, Precision(CPU, dtype))


TARGETS = [
    {"labels": torch.tensor([1, 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 2)},
    {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.4, 0.1, 0.1]])},
]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_islands_of_float32(dtype):
    """Products are of 16 bits; what is not is seen operator by operator, backward pass and all."""
    step = step_in(dtype)
    targets = Targets.from_list(TARGETS)
    heads = []
    for layer in step.learner.model.bbox_embed.layers:
        layer.register_forward_hook(lambda _, inputs, out: heads.append((inputs[0], out)))
    step.learner.begin(0, 1)
    with Dtypes() as seen:
        step.forward_backward(random_batch((64, 96), (50, 33)), targets)
    assert {d for call in seen.taken[aten.convolution] for d in call} == {dtype}
    assert {d for call in seen.taken[aten.convolution_backward] for d in call} == {dtype}
    assert dtype in {d for call in seen.taken[aten.addmm] for d in call}
    assert {d for call in heads for x in call for d in [x.dtype]} == {FP32}
    for op in (aten.sigmoid, aten.sin, aten.cos, torch.ops.detr_fast.hungarian_match):
        assert {d for call in seen.taken[op] for d in call} == {FP32}, op
    for op in (torch.ops.detr_fast.set_loss, torch.ops.detr_fast.set_loss_backward):
        assert {d for call in seen.taken[op] for d in call} == {FP32}, op
    statistics = [d for call in seen.returned[aten.native_layer_norm] for d in call[1:]]
    assert set(statistics) == {FP32}
    attended = [op for op in seen.returned if "scaled_dot_product" in str(op)]
    assert attended
    for op in attended:  # the sums of exponentials come second
        assert {call[1] for call in seen.returned[op] if len(call) == 2} <= {FP32}
    gradients = [p.grad for p in step.learner.model.parameters() if p.requires_grad]
    assert {g.dtype for g in gradients} == {FP32}


def test_losses_of_bfloat16_are_those_of_its_outputs():
    """Of float64 computed from the very logits and boxes that came out of the model."""
    step = step_in(BF16)
    outputs = []
    step.learner.model.register_forward_hook(lambda _, inputs, out: outputs.append(out))
    targets = Targets.from_list(TARGETS)
    step.learner.begin(0, 1)
    values = step.forward_backward(random_batch((64, 96), (50, 33)), targets)
    with ops.use_reference():
        exact = step.criterion(outputs[0], targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0"):
        assert_close(values[f"{name}_unscaled"], exact[name].detach(), rtol=1e-5, atol=1e-6)


def test_places_are_rounded_once():
    """Sines of angles that were bfloat16 before would be off by 0.02."""
    encoding = PositionEncodingSine(64).train()
    features = torch.empty(1, 8, 20, 30)
    exact = encoding(features, None)
    with torch.autocast("cpu", BF16):
        assert torch.equal(encoding(features.bfloat16(), None), exact.bfloat16())


@pytest.fixture(scope="module")
def resnet50_pair():
    fast = random_detr(ModelConfig())
    original = random_detr(ModelConfig(), folded=False)
    original.load_state_dict(fast.state_dict())
    return fast, original


@pytest.mark.parametrize("sizes", [[(96, 128), (96, 128)], [(96, 128), (70, 101)]], ids=str)
def test_off_is_the_original(resnet50_pair, sizes):
    """Logits and boxes of all layers of the published architecture, within 1e-4."""
    fast, original = resnet50_pair
    batch = random_batch(*sizes)
    chosen = of("--amp off")
    with torch.no_grad():
        with chosen.autocast():
            found = fast(ImageBatch(batch.tensors.to(chosen.images), batch.sizes))
        with ops.use_reference():
            expected = original(batch)
    for layer, other in zip(
        (found, *found["aux_outputs"]), (expected, *expected["aux_outputs"]), strict=True
    ):
        assert other["pred_logits"].std() > 1e-2
        for name in ("pred_logits", "pred_boxes"):
            assert_close(layer[name], other[name], rtol=0, atol=1e-4)


def test_bfloat16_is_close_to_the_original(resnet50_pair):
    fast, original = resnet50_pair
    batch = random_batch((96, 128), (70, 101))
    with torch.no_grad():
        with Precision(CPU, BF16).autocast():
            found = fast(batch)
        expected = original(batch)
    for name, tolerance in (("pred_logits", 0.3), ("pred_boxes", 0.03)):
        error = (found[name] - expected[name]).abs()
        assert 1e-5 < error.mean() < tolerance / 4
        assert error.max() < tolerance


def test_runs_go_on_under_another_precision(tmp_path, capsys, monkeypatch):
    """The scale of float16 goes with the checkpoints of float16, and starts anew behind others."""
    monkeypatch.setattr(LossScale, "start", 2.0**8)  # no gradient here overflows
    scales = []
    for epochs, amp in enumerate(("fp16", "bf16", "fp16", "fp16", "off"), 1):
        assert fit(f"--epochs {epochs} --amp {amp} --output_dir {tmp_path} --resume auto") == 0
        assert f"(--amp {amp}" in capsys.readouterr().out
        scales.append(read_checkpoint(tmp_path / "checkpoint.pth").get("scaler"))
    assert [scale is not None for scale in scales] == [True, False, True, True, False]
    steps = test_train.STEPS
    good = [scale["_growth_tracker"] for scale in scales if scale]
    assert good == [steps, steps, 2 * steps]
