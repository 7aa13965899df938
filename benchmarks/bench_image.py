# SPDX-License-Identifier: Apache-2.0
"""From a padded batch of bytes to normalised pixels, channels_last, zero where it is padding.

A padded batch as DETR trains on and two images of its evaluation; on a GPU also 16 of them.  Every
contender ends with the same tensor: what a peer does not do (padding, layout, dtype) it gets done
by torch.  Bytes count what is read of real pixels and all that is written.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Case,
    Check,
    Contender,
    Missing,
    Setup,
    compiled,
    on_cpu,
    optional,
    within,
)
from detr_fast import ops, reference
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD

SHAPES = [(2, 640, 640), (2, 800, 1066)]  # images, height, width
ON_GPU = (16, 800, 1066)
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"planes": torch.contiguous_format, "pixels": torch.channels_last}
# torchvision multiplies with 1 / 255, which may round to another bfloat16
AGREE: dict[torch.dtype, Check] = {
    torch.float32: within(atol=1e-5),
    torch.bfloat16: within(rtol=2**-7, atol=1e-5),
}
FLOORS = {  # of one thread
    torch.float32: {"eager": 1.3, "torchvision": 1.3},
    torch.bfloat16: {"eager": 2.5, "torchvision": 2.5},
}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Shapes x dtypes x layouts of the bytes; with `quick` the first shape alone."""
    shapes = SHAPES[:1] if quick else [*SHAPES, *([ON_GPU] if device.type == "cuda" else [])]
    result = []
    for shape in shapes:
        for dtype in DTYPES:
            for layout, memory_format in LAYOUTS.items():
                name = f"{'x'.join(map(str, shape))} {layout} to {str(dtype)[6:]}"
                build = functools.partial(batch, device, shape, dtype, memory_format)
                moved = 3 * int(padded_sizes(*shape).long().prod(1).sum())
                moved += 3 * shape[0] * shape[1] * shape[2] * dtype.itemsize
                floors = on_cpu(device, FLOORS[dtype])
                result.append(Case(name, build, AGREE[dtype], bytes=moved, floors=floors))
    return result


def test_image(case, bench):
    bench(case)


def batch(
    device: torch.device,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Setup:
    """Random bytes: natural images have fewer values at a time, which no contender minds."""
    count, height, width = shape
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator
    ).to(device, memory_format=memory_format)
    sizes = padded_sizes(*shape).to(device)
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def call(function: Any, **options: Any) -> Contender:
        return Contender(functools.partial(function, images, sizes, dtype=dtype), **options)

    def eager(images: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
        pixels = images.float().div_(255).sub_(mean).div_(std)
        return finished(pixels, sizes, dtype)

    transforms = optional("torchvision.transforms.v2.functional")
    return Setup(
        expected=functools.partial(reference.normalize_images, images, sizes, dtype=dtype),
        contenders={
            "detr_fast": call(ops.normalize_images),
            "eager": call(eager),
            "torchvision": transforms
            if isinstance(transforms, Missing)
            # its mean and std travel to the GPU with each call
            else call(functools.partial(by_torchvision, transforms), waits=True),
            "torch.compile": call(compiled(reference.normalize_images), slow_start=True),
        },
    )


def by_torchvision(transforms: Any, images: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """As a training script that pads bytes would write it."""
    pixels = transforms.to_dtype(images, torch.float32, scale=True)
    pixels = transforms.normalize(pixels, [*IMAGENET_MEAN], [*IMAGENET_STD], inplace=True)
    return finished(pixels, sizes, dtype)


def finished(pixels: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros where padded, dtype and layout."""
    height, width = pixels.shape[2:]
    rows = torch.arange(height, device=pixels.device)[:, None] >= sizes[:, 0, None, None]
    columns = torch.arange(width, device=pixels.device) >= sizes[:, 1, None, None]
    pixels.masked_fill_((rows | columns)[:, None], 0)
    return pixels.to(dtype, memory_format=torch.channels_last)


def padded_sizes(count: int, height: int, width: int) -> Tensor:
    """Height and width of each image without padding: of batches grouped by size, int32 (B, 2)."""
    shares = torch.linspace(0.8, 1.0, count)
    return torch.stack([shares * height, shares.flip(0) * width], dim=1).int()
