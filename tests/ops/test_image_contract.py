# SPDX-License-Identifier: Apache-2.0
"""What normalize_images promises to torch and to its callers: opcheck, compile, capture, errors."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.engine.dispatched import dispatched
from detr_fast.ops import image
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD
from tests.cudasim import simulated
from tests.ops.test_image import DTYPES, random_images

OP = torch.ops.detr_fast.normalize_images


def padded_batch(*sizes, seed=1, device="cpu", shape=(2, 3, 8, 16)):
    sizes = torch.tensor(sizes or [[8, 16], [5, 11]], dtype=torch.int32, device=device)
    return random_images(*shape, seed=seed).to(device), sizes


@DTYPES
def test_passes_opcheck(machine, dtype):
    images, sizes = padded_batch(device=machine)
    for padding in (None, sizes):
        for layout in (torch.contiguous_format, torch.channels_last):
            inputs = images.to(memory_format=layout), padding, IMAGENET_MEAN, IMAGENET_STD, dtype
            torch.library.opcheck(OP.default, inputs)


def test_compiles_without_breaks_and_once_for_any_size(machine):
    def consumer(images, sizes):
        return ops.normalize_images(images, sizes, dtype=torch.bfloat16).float().sum((1, 2))

    torch._dynamo.reset()
    compiled = torch.compile(consumer, fullgraph=True, dynamic=True)
    for seed, (height, width) in enumerate([(8, 16), (24, 32), (5, 7)]):
        images, sizes = padded_batch(seed=seed, device=machine, shape=(2, 3, height, width))
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            assert_close(compiled(images, sizes), consumer(images, sizes))


@DTYPES
def test_meta_tensors_have_the_layout(dtype):
    images = torch.empty(2, 3, 5, 7, dtype=torch.uint8, device="meta")
    ours = ops.normalize_images(images, dtype=dtype)
    real = ops.normalize_images(random_images(2, 3, 5, 7), dtype=dtype)
    assert ours.device.type == "meta"
    assert (ours.shape, ours.stride(), ours.dtype) == (real.shape, real.stride(), dtype)


def test_autocast_changes_nothing(machine):
    images, sizes = padded_batch(device=machine)
    expected = ops.normalize_images(images, sizes)
    with torch.autocast(machine.type, torch.bfloat16):
        assert_close(ops.normalize_images(images, sizes), expected, rtol=0, atol=0)


def test_is_one_op(machine):
    images, sizes = padded_batch(device=machine)
    names = dispatched(lambda: ops.normalize_images(images, sizes))
    assert names == ["detr_fast.normalize_images.default", "aten.permute.default"]


def test_inputs_stay_as_they_are(device):
    inputs = padded_batch(device=device)
    before = [tensor.clone() for tensor in inputs]
    ops.normalize_images(*inputs)
    assert_close(inputs, tuple(before), rtol=0, atol=0)


@DTYPES
def test_does_not_depend_on_the_number_of_threads(dtype):
    inputs = padded_batch([300, 200], [90, 210], shape=(2, 3, 301, 211))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.normalize_images(*inputs, dtype=dtype)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_close(ops.normalize_images(*inputs, dtype=dtype), alone, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@DTYPES
def test_waits_for_nothing_and_replays_in_a_graph(gpu, dtype):
    """Captured once on a stream of its own, for what stands in the tensors when it is replayed."""
    inputs = padded_batch(device=gpu)
    ops.normalize_images(*inputs, dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.normalize_images(*inputs, dtype=dtype)
        with torch.cuda.stream(stream):
            ops.normalize_images(*inputs, dtype=dtype)
            with torch.cuda.graph(graph, stream=stream):
                captured = ops.normalize_images(*inputs, dtype=dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    other = padded_batch([2, 3], [7, 16], seed=2, device=gpu)
    for mine, its in zip(inputs, other, strict=True):
        mine.copy_(its)
    graph.replay()
    assert_close(captured, ops.normalize_images(*other, dtype=dtype), rtol=0, atol=0)


def test_allocates_the_result_alone(gpu):
    images, sizes = padded_batch([512, 500], [400, 512], device=gpu, shape=(2, 3, 512, 512))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = ops.normalize_images(images, sizes)
    assert torch.cuda.max_memory_allocated() - before <= ours.numel() * ours.element_size() + 512


def test_use_reference_puts_the_reference_in_place():
    inputs = padded_batch()
    assert ops.backend("normalize_images", *inputs) == ("fused", "cpu has a kernel for this")
    with ops.use_reference():
        assert ops.backend("normalize_images", *inputs)[0] == "reference"
        names = dispatched(lambda: ops.normalize_images(*inputs))
        twin = ops.normalize_images(*inputs)
    assert not any(name.startswith("detr_fast") for name in names)
    assert_close(twin, reference.normalize_images(*inputs), rtol=0, atol=0)


def test_runs_the_reference_where_there_is_no_kernel(monkeypatch):
    inputs = padded_batch()
    expected = ops.normalize_images(*inputs)
    monkeypatch.setattr(image, "why_no_kernel", lambda op, device: f"no {op} for {device.type}")
    path = ops.backend("normalize_images", *inputs)
    assert path == ("reference", "no normalize_images for cpu")
    names = dispatched(lambda: ops.normalize_images(*inputs))
    assert not any(name.startswith("detr_fast") for name in names)
    assert_close(ops.normalize_images(*inputs), expected, rtol=0, atol=0)


IMAGES, SIZES = padded_batch()
BAD = {
    "floats": (
        {"images": IMAGES.float()},
        r"images: expected dtype torch.uint8, got torch.float32; .*transforms.normalize",
    ),
    "one image": ({"images": IMAGES[0]}, r"images: expected shape \(B, 3, H, W\), got \(3, 8, 16"),
    "grey": ({"images": IMAGES[:, :1]}, r"images: expected shape \(B, 3, H, W\), got \(2, 1, 8"),
    "long sizes": (
        {"sizes": SIZES.long()},
        r"sizes: expected dtype torch.int32, got torch.int64; call sizes.int\(\)",
    ),
    "sizes of one": ({"sizes": SIZES[:1]}, r"sizes: expected shape \(2, 2\), got \(1, 2\)"),
    "sizes elsewhere": (
        {"sizes": SIZES.to("meta")},
        "sizes: expected the device of images, cpu, got meta",
    ),
    "mean": ({"mean": (0.5,)}, "mean: expected 3 numbers, got 1"),
    "std": ({"std": (0.5,) * 4}, "std: expected 3 numbers, got 4"),
    "no deviation": ({"std": (0.5, 0.0, 1.0)}, "std: expected positive numbers, got .0.5, 0.0, 1"),
    "deviation NaN": ({"std": (0.5, torch.nan, 1.0)}, "std: expected positive numbers, got"),
    "double": (
        {"dtype": torch.float64},
        "dtype: expected one of torch.float32, torch.bfloat16, torch.float16, got torch.float64",
    ),
}


@pytest.mark.parametrize("twin", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(changed, message, twin):
    arguments = {"images": IMAGES, "sizes": SIZES} | changed

    def call():
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.normalize_images(**arguments)

    if twin:
        with ops.use_reference():
            call()
    else:
        call()


BAD_OF_OP = {
    "images": (0, IMAGES.float(), "images: expected dtype Byte, got Float"),
    "channels": (0, IMAGES[:, :2], r"images: expected shape \(\*, 3, \*, \*\), got \(2, 2, 8, 16"),
    "pixels": (
        0,
        IMAGES[:1, :, :1, :1].expand(1, 3, 2**15 + 1, 2**15),
        "images: expected at most 1073741824 images and pixels of an image, got 1 of 32769 x 32768",
    ),
    "count": (
        0,
        IMAGES[:1, :, :0, :0].expand(2**30 + 1, 3, 0, 0),
        "images: expected at most 1073741824 images .*, got 1073741825 of 0 x 0",
    ),
    "sizes": (1, SIZES.long(), "sizes: expected dtype Int, got Long"),
    "shape of sizes": (1, SIZES[:, :1], r"sizes: expected shape \(2, 2\), got \(2, 1\)"),
    "mean": (2, (0.5,), "mean: expected 3 numbers, got 1"),
    "std": (3, (0.5,) * 4, "std: expected 3 numbers, got 4"),
    "dtype": (4, torch.float64, "dtype: expected Float, Half or BFloat16, got Double"),
}


@pytest.mark.parametrize(("index", "value", "message"), BAD_OF_OP.values(), ids=BAD_OF_OP)
def test_the_op_names_wrong_arguments(device, index, value, message):
    arguments = [IMAGES.to(device), SIZES.to(device), IMAGENET_MEAN, IMAGENET_STD, torch.float32]
    arguments[index] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments)


def test_the_op_names_sizes_on_another_device(gpu):
    with pytest.raises(RuntimeError, match="sizes: expected the device of images, cuda:0, got cpu"):
        OP(IMAGES.to(gpu), SIZES, IMAGENET_MEAN, IMAGENET_STD, torch.float32)


def accesses(images, **options):
    """Reads and writes of a launch."""
    with simulated() as simulator:
        before = simulator.counts()["accesses"]
        ops.normalize_images(images, **options)
        return simulator.counts()["accesses"] - before


@pytest.mark.parametrize("place", ["planes", "pixels", "crop of planes", "crop of pixels"])
@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_reads_several_bytes_at_a_time(needs_simulator, place, dtype, group):
    """A word of each channel, not a byte of each pixel and channel, but where words begin off."""
    layout = torch.channels_last if "pixels" in place else torch.contiguous_format
    images = random_images(1, 3, 17, 80).to(memory_format=layout)
    aligned, off = images[..., 8:72], images[..., 9:73]
    if "crop" not in place:
        aligned, off = (
            storage.view(1, 16, 64, 3).permute(0, 3, 1, 2)
            if place == "pixels"
            else storage.view(1, 3, 16, 64)
            for storage in (random_images(3072), random_images(3073)[1:])
        )
    groups = aligned.numel() // 3 // group
    saved = 3 * (group - 1) * groups  # reads
    assert accesses(off, dtype=dtype) - accesses(aligned, dtype=dtype) >= saved


def test_padding_is_not_read(needs_simulator):
    images, none = random_images(1, 3, 16, 64), torch.zeros(1, 2, dtype=torch.int32)
    full = torch.tensor([[16, 64]], dtype=torch.int32)
    words = images.numel() // 4
    assert accesses(images, sizes=full) - accesses(images, sizes=none) == words


def test_does_not_depend_on_the_schedule(needs_simulator):
    outcomes = []
    for schedule in ("forward", "random"):
        with simulated(schedule=schedule):
            outcomes.append(ops.normalize_images(*padded_batch()))
    assert_close(*outcomes, rtol=0, atol=0)
