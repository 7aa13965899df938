# SPDX-License-Identifier: Apache-2.0
"""normalize_images against its reference twin, bit for bit."""

import pytest
import torch
from torch.testing import assert_close

from detr_fast import ops, reference
from detr_fast.data.transforms import normalize
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def random_images(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator)


def assert_same(images, sizes=None, **options):
    """Bits, dtype and layout are those of the reference."""
    ours = ops.normalize_images(images, sizes, **options)
    theirs = reference.normalize_images(images, sizes, **options)
    assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


@DTYPES
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN, IMAGENET_STD),
        ((0.0, 0.5, 1.0), (1.0, 1 / 255, 0.5)),
        ((0.1, 1 / 3, 2 / 3), (1e-3, 0.3, 7.0)),
    ],
    ids=["imagenet", "plain", "odd"],
)
def test_every_byte_of_every_channel(device, mean, std, dtype):
    images = torch.stack([torch.arange(256, dtype=torch.uint8).roll(17 * c) for c in range(3)])
    images = images.view(1, 3, 16, 16).to(device)
    assert_same(images, mean=mean, std=std, dtype=dtype)


@DTYPES
def test_values_are_those_of_the_transform(device, dtype):
    images = random_images(2, 3, 24, 20)
    ours = ops.normalize_images(images.to(device), dtype=dtype)
    assert_close(ours.cpu(), normalize(images).to(dtype), rtol=0, atol=0)


def channels_last(images):
    return images.to(memory_format=torch.channels_last)


LAYOUTS = {
    "planes": lambda images: images,
    "pixels": channels_last,
    "crop of planes": lambda images: images[:, :, 1:-1, 4:-4],
    "crop of planes off 4 bytes": lambda images: images[:, :, 1:, 1:],
    "crop of pixels": lambda images: channels_last(images)[:, :, 1:-1, 4:-4],
    "crop of pixels off 4 bytes": lambda images: channels_last(images)[:, :, :, 1:-3],
    "every second column": lambda images: images[:, :, :, ::2],
    "every third column": lambda images: images[:, :, :, ::3],
    "one column, repeated": lambda images: images[:, :, :, :1].expand(-1, -1, -1, 8),
    "transposed": lambda images: images.mT,
    "channels reversed": lambda images: images.flip(1),
    "of four channels": lambda images: torch.cat([images, images[:, :1]], 1)[:, 1:],
    "of four channels, pixels": lambda images: channels_last(torch.cat([images, images[:, :1]], 1))[
        :, :3
    ],
    "expanded": lambda images: images[:1, :1].expand(3, 3, -1, -1),
    "one image of many": lambda images: images[1:2],
    "one row": lambda images: images[:, :, :1],
    "one column": lambda images: images[:, :, :, :1],
    "one column of pixels": lambda images: channels_last(images)[:, :, :, :1],
}


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_images_lie_in_any_strides(device, layout, dtype):
    images = layout(random_images(3, 3, 10, 24).to(device))
    height, width = images.shape[2:]
    sizes = torch.tensor([[height, width], [height // 2, width - 1], [1, width // 2]])
    assert_same(images, sizes[: len(images)].int().to(device), dtype=dtype)
    assert_same(images, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("offset", range(8))
def test_storage_begins_anywhere(device, offset, dtype):
    """Also where the vectors of output and input do not begin with the same pixel."""
    shape = (2, 3, 4, 16)
    storage = random_images(2 * 3 * 4 * 16 + offset)[offset:]
    assert_same(storage.view(shape).to(device), dtype=dtype)
    assert_same(storage.to(device).view(shape), dtype=dtype)
    assert_same(storage.to(device).view(2, 4, 16, 3).permute(0, 3, 1, 2), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("height", "width"),
    # fewer pixels than a vector, rows that end within one, more than a warp, a block
    [(1, 1), (1, 5), (3, 3), (7, 1), (2, 8), (5, 7), (3, 43), (1, 260), (35, 33), (9, 256)],
)
def test_sizes_need_not_fit_vectors(device, height, width, memory_format, dtype):
    images = random_images(3, 3, height, width).to(device, memory_format=memory_format)
    sizes = torch.tensor([[height, width], [height - 1, width], [height, width - 1]])
    assert_same(images, sizes.int().to(device), dtype=dtype)
    assert_same(images, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(
    "size", [(0, 0), (0, 9), (6, 0), (1, 1), (6, 9), (5, 8), (-1, 4), (4, -7), (99, 3), (3, 99)]
)
def test_padding_is_exactly_zero(device, size, dtype):
    images = random_images(2, 3, 6, 9).to(device)
    sizes = torch.tensor([size, (2**31 - 1, -(2**31))], dtype=torch.int32, device=device)
    ours = assert_same(images, sizes, dtype=dtype)
    height, width = (max(side, 0) for side in size)
    assert ours[0, :, height:].eq(0).all()
    assert ours[0, :, :, width:].eq(0).all()
    assert ours[0, :, :height, :width].ne(0).all()  # no byte has the mean's value
    assert ours[1].eq(0).all()


def test_what_padding_holds_does_not_matter(device):
    images = random_images(2, 3, 8, 16).to(device)
    sizes = torch.tensor([[5, 11], [8, 3]], dtype=torch.int32, device=device)
    real = reference.normalize_images(torch.zeros_like(images), sizes).ne(0)
    ours = ops.normalize_images(images, sizes)
    assert_close(ops.normalize_images(images * real, sizes), ours, rtol=0, atol=0)


def test_sizes_lie_in_any_strides(device):
    images = random_images(3, 3, 8, 16).to(device)
    sizes = torch.tensor([[5, 8, 1], [11, 3, 16]], dtype=torch.int32, device=device)
    assert_same(images, sizes.T)


@DTYPES
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 0, 0)])
def test_no_pixels(device, shape, dtype):
    images = torch.empty(shape, dtype=torch.uint8, device=device)
    sizes = torch.zeros(shape[0], 2, dtype=torch.int32, device=device)
    for padding in (None, sizes):
        ours = ops.normalize_images(images, padding, dtype=dtype)
        assert (ours.shape, ours.dtype) == (shape, dtype)


def test_warps_take_several_chunks(device):
    """Two blocks an image, each with more than one turn; the images are one in memory."""
    images = random_images(1, 3, 5, 410).expand(704, -1, -1, -1).to(device)
    ours = ops.normalize_images(images)
    expected = reference.normalize_images(images[:1]).expand_as(ours)
    assert_close(ours, expected, rtol=0, atol=0)


def test_offsets_beyond_31_bits(machine):
    """The images lie 2 GiB apart, in memory of which only they are touched, but for a simulator."""
    step, shape = 2**31 + 8, (3, 3, 2, 8)
    storage = torch.empty(2 * step + 48, dtype=torch.uint8, device=machine)
    images = storage.as_strided(shape, (step, 16, 8, 1))
    images.copy_(random_images(*shape))
    assert_same(images)


def test_more_values_than_31_bits_count(gpu):
    images = random_images(1, 3, 1024, 1024).to(gpu).expand(700, -1, -1, -1)
    ours = ops.normalize_images(images, dtype=torch.bfloat16)
    expected = reference.normalize_images(images[:1], dtype=torch.bfloat16)[0]
    for number in (0, 350, 699):
        assert_close(ours[number], expected, rtol=0, atol=0)
