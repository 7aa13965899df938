# SPDX-License-Identifier: Apache-2.0
"""The checks that a mutant of normalize_images has to pass.

Every byte; layouts that are read in vectors, and others; images that begin at each place in a
vector and end within a vector, a warp and a block; sizes of all kinds; more than one turn a block;
what is refused.  The CPU twin says what is right, to the bit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import detr_fast  # noqa: F401 (registers the ops)
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD
from tests.mutations.checks import Check, run
from tests.ops.test_image import LAYOUTS, random_images

OP = "normalize_images"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = {dtype: {"atol": 0.0, "rtol": 0.0} for dtype in DTYPES}
MOST = 2**30  # images, and pixels of an image


def call(images: Tensor, sizes: Tensor | None, dtype: torch.dtype, **options: object) -> Check:
    return Check(OP, (images, sizes, IMAGENET_MEAN, IMAGENET_STD, dtype), **options)


def sizes_of(images: Tensor, *sides: tuple[int, int]) -> Tensor:
    """As many as there are images."""
    return torch.tensor(sides, dtype=torch.int32)[: len(images)]


def values(dtype: torch.dtype) -> Iterator[Check]:
    every_byte = torch.stack([torch.arange(256, dtype=torch.uint8).roll(17 * c) for c in range(3)])
    yield call(every_byte.view(1, 3, 16, 16), None, dtype)
    for layout in LAYOUTS.values():
        images = layout(random_images(3, 3, 10, 24))
        height, width = images.shape[2:]
        sizes = sizes_of(images, (height, width), (height // 2, width - 1), (1, width // 2))
        yield call(images, sizes, dtype, copies=False)
    for height, width in ((1, 1), (3, 3), (2, 8), (5, 7), (3, 43), (9, 257)):
        images = random_images(3, 3, height, width)
        yield call(images, None, dtype)
        yield call(images, sizes_of(images, (-1, 9), (height, width), (99, width - 1)), dtype)
    for offset in (1, 2, 4):
        storage = random_images(2 * 3 * 4 * 16 + offset)[offset:]
        yield call(storage.view(2, 3, 4, 16), None, dtype)
    images = random_images(3, 3, 8, 16)
    yield call(images, torch.tensor([[5, 8, 1], [11, 3, 16]], dtype=torch.int32).T, dtype)
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        yield call(torch.empty(shape, dtype=torch.uint8), None, dtype)


def limits() -> Iterator[Check]:
    """Several turns of a block; the most images and pixels, and one more, without memory."""
    many = random_images(1, 3, 5, 410).expand(704, -1, -1, -1)
    yield call(many, None, torch.float32, every_schedule=False)
    one = random_images(1, 3, 1, 1)
    none = torch.empty(1, 3, 0, 0, dtype=torch.uint8)
    yield call(none.expand(MOST, -1, -1, -1), None, torch.float32)
    message = f"expected at most {MOST} images and pixels of an image, got {MOST + 1} of 0 x 0"
    yield call(none.expand(MOST + 1, -1, -1, -1), None, torch.float32, message=message)
    no_images = one[:0]
    for height, width in ((2**15, 2**15), (1, MOST), (MOST, 1), (0, MOST), (MOST, 0)):
        yield call(no_images.expand(0, 3, height, width), None, torch.float32)
    for height, width in ((2**15 + 1, 2**15), (1, MOST + 1), (MOST + 1, 1)):
        message = f"got 0 of {height} x {width}"
        yield call(no_images.expand(0, 3, height, width), None, torch.float32, message=message)
    for height, width in ((0, MOST + 1), (MOST + 1, 0)):
        empty = torch.empty(0, 3, height, width, dtype=torch.uint8)
        yield call(empty, None, torch.float32, message=f"got 0 of {height} x {width}")


def refusals() -> Iterator[Check]:
    images = random_images(2, 3, 4, 5)
    sizes = sizes_of(images, (4, 5), (2, 3))
    yield call(images.float(), None, torch.float32, message="images: expected dtype Byte")
    yield call(images[:, :2], None, torch.float32, message="images: expected shape")
    yield call(images[0], None, torch.float32, message="images: expected shape")
    yield call(images, sizes.long(), torch.float32, message="sizes: expected dtype Int")
    yield call(images, sizes[:1], torch.float32, message="sizes: expected shape")
    yield call(images, sizes[:, :1], torch.float32, message="sizes: expected shape")
    yield call(images, None, torch.float64, message="dtype: expected Float, Half or BFloat16")
    for mean, std, name in (
        (IMAGENET_MEAN[1:], IMAGENET_STD, "mean"),
        (IMAGENET_MEAN, (*IMAGENET_STD, 1.0), "std"),
    ):
        arguments = images, None, mean, std, torch.float32
        yield Check(OP, arguments, f"{name}: expected 3 numbers")


def all_checks() -> list[Check]:
    """With the results of the CPU twin."""
    checks = [*(check for dtype in DTYPES for check in values(dtype)), *limits(), *refusals()]
    return [
        check._replace(right=None if check.message else run(check), tolerance=EXACT)
        for check in checks
    ]
