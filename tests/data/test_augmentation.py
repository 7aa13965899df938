# SPDX-License-Identifier: Apache-2.0
"""Plans have the distribution of the original's transforms, and do to an image what they say."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from torchvision.transforms.v2 import functional

from detr_fast.data.augmentation import (
    MAX_SIZE,
    SCALES,
    Augmentation,
    draw,
    draw_flip,
    longest_side,
    resized_size,
    resized_sizes,
)
from tests.data.test_transforms import make_target, picture

DRAWS = 20_000
SOURCES = [(480, 640), (640, 480), (333, 500), (200, 1200), (64, 48)]


def seeds(count, start=0):
    return np.random.default_rng(start).integers(0, 2**63 - 1, count)


@pytest.mark.parametrize(
    ("height", "width", "short_side", "max_size", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),  # 1066.67 is cut, not rounded
        (640, 480, 800, 1333, (1066, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (500, 500, 800, 1333, (800, 800)),
        (800, 1066, 800, 1333, (800, 1066)),  # fits already
        (375, 1242, 800, 1333, (402, 1331)),  # 402.48 -> 402, then 402 * 3.312 = 1331.4
        (1242, 375, 800, 1333, (1331, 402)),
        (300, 1000, 800, 1333, (400, 1333)),  # 399.9 -> 400, 1333.33 -> 1333
        (600, 1000, 800, 1333, (800, 1333)),  # 1333.33 > 1333: corrected to 799.8 -> 800
        (375, 1242, 400, None, (400, 1324)),  # no limit
        (1, 5000, 800, 1333, (1, 5000)),  # a line keeps a pixel
    ],
)
def test_resized_size(height, width, short_side, max_size, expected):
    assert resized_size(height, width, short_side, max_size) == expected


def test_resized_size_stays_within_limit_and_keeps_aspect():
    for height in range(37, 900, 61):
        for width in range(41, 900, 53):
            h, w = resized_size(height, width, 800, 1333)
            assert min(h, w) <= 800
            assert max(h, w) <= 1333 + max(h, w) / min(h, w)  # half a pixel of the short side
            assert abs(h / w - height / width) <= (1 + h / w) / min(h, w)


def published_size(width, height, size, max_size=None):
    """``get_size_with_aspect_ratio`` of facebookresearch/detr, written out."""
    if max_size is not None:
        shortest, longest = float(min(width, height)), float(max(width, height))
        if longest / shortest * size > max_size:
            size = round(max_size * shortest / longest)
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


def test_sizes_of_many_images_are_the_published_ones():
    generator = random.Random(0)
    sizes = [(generator.randint(20, 900), generator.randint(20, 900)) for _ in range(3000)]
    shorts = [generator.choice(SCALES) for _ in sizes]
    for limit in (None, MAX_SIZE):
        found = resized_sizes(np.array(sizes), np.array(shorts), limit).tolist()
        assert [tuple(size) for size in found] == [
            published_size(w, h, short, limit) for (h, w), short in zip(sizes, shorts, strict=True)
        ]


def original(generator, height, width):
    """The original's transforms drawn one by one; a side under 384 pixels is kept whole."""
    flip = generator.random() < 0.5
    scales = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    if generator.random() < 0.5:
        size = published_size(width, height, generator.choice(scales), 1333)
        return flip, None, None, None, None, None, *size
    first_height, first_width = published_size(width, height, generator.choice([400, 500, 600]))
    w = generator.randint(min(384, first_width), min(first_width, 600))
    h = generator.randint(min(384, first_height), min(first_height, 600))
    top, left = generator.randint(0, first_height - h), generator.randint(0, first_width - w)
    size = published_size(w, h, generator.choice(scales), 1333)
    return flip, first_height, h, w, top, left, *size


@pytest.mark.parametrize(("height", "width"), SOURCES)
def test_plans_have_the_distribution_of_the_original(height, width):
    generator = random.Random(height)
    expected = [original(generator, height, width) for _ in range(DRAWS)]
    plans = draw(seeds(DRAWS), np.broadcast_to([[height, width]], (DRAWS, 2)))
    drawn = [
        (
            plan.flip,
            *((plan.first[0], *plan.crop[2:], *plan.crop[:2]) if plan.crop else [None] * 5),
            *plan.size,
        )
        for plan in (plans[i] for i in range(DRAWS))
    ]

    def column(rows, index):
        return np.array([row[index] for row in rows if row[index] is not None], dtype=np.int64)

    for index in range(8):
        a, b = column(expected, index), column(drawn, index)
        assert abs(len(a) - len(b)) < 4 * DRAWS**0.5
        assert ks_2samp(a, b).pvalue > 1e-3, index
    # what goes together: flip with branch, crop with place, cropped or not with the final size
    pairs = [
        lambda r: (r[0], r[3] is None),
        lambda r: r[3] is not None and (r[3] > 500, r[5] > 60, r[4] > 20),
        lambda r: (r[3] is None, min(r[6:]) // 64, r[6] > r[7]),
    ]
    for pair in pairs:
        kinds = sorted({pair(r) for r in expected + drawn}, key=str)
        table = [
            [sum(pair(r) == kind for r in rows) for kind in kinds] for rows in (expected, drawn)
        ]
        assert chi2_contingency(table).pvalue > 1e-3


def test_a_plan_follows_from_seed_and_size_alone():
    sizes = np.array([SOURCES[i % len(SOURCES)] for i in range(50)])
    together = draw(seeds(50), sizes)
    for index in range(50):
        alone = draw(seeds(50)[index : index + 1], sizes[index : index + 1])[0]
        assert together[index] == alone
        assert together[index].flip == draw_flip(int(seeds(50)[index]))
    assert draw(seeds(0), sizes[:0]).size.shape == (0, 2)
    # frozen: a resumed run draws what it drew
    plan = Augmentation((600, 800), (37, 385, 500, 397), True, (725, 576))
    assert draw(np.array([8]), np.array([[480, 640]]))[0] == plan


def test_plans_are_in_proportion_to_the_short_side():
    plans = draw(seeds(500), np.broadcast_to([[96, 128]], (500, 2)), 160)
    assert longest_side(160) == 267
    assert set(plans.size[~plans.crops].min(axis=1)) == {round(s / 5) for s in SCALES}
    assert plans.crop[plans.crops][:, 2:].max() <= 120
    assert set(plans.first[plans.crops][:, 0]) == {80, 100, 120}


def test_crops_reach_every_edge_and_no_further():
    plans = draw(seeds(50_000), np.broadcast_to([[30, 12]], (50_000, 2)), 20)
    first, (top, left, height, width) = plans.first, plans.crop.T
    assert (top.min(), left.min()) == (0, 0)
    bottom, right = first[:, 0] - top - height, first[:, 1] - left - width
    assert (bottom.min(), right.min()) == (0, 0)
    assert (np.minimum(first.T, 10) <= (height, width)).all()
    assert (np.minimum(first.T, 15) >= (height, width)).all()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def some_plans(height, width, count=12):
    plans = draw(seeds(count, 3), np.broadcast_to([[height, width]], (count, 2)), 320)
    assert 2 <= plans.crops.sum() <= count - 2
    return [plans[i] for i in range(count)]


@pytest.mark.parametrize("of", [lambda image: image, as_tensor], ids=["pillow", "tensor"])
def test_boxes_stay_on_what_they_hold(of):
    """A white rectangle on black is found where its box says."""
    height, width, box = 100, 140, (50, 35, 90, 70)
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    target = make_target([box, (0, 0, 1, 1)], height, width)
    for plan in some_plans(height, width, 40):
        result, moved = plan(of(image), target)
        pixels = np.array(result) if isinstance(result, Image.Image) else result.permute(1, 2, 0)
        assert pixels.shape[:2] == plan.size == tuple(moved["size"].tolist())
        rows, columns = np.nonzero(np.asarray(pixels)[:, :, 0] > 127)
        assert len(moved["boxes"]) == len(moved["labels"])
        if not len(rows):
            assert 10 not in moved["labels"] or moved["area"][0] < 20
            continue
        assert moved["labels"][0] == 10
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(moved["boxes"][0].numpy(), found, atol=2.1)
        x0, y0, x1, y1 = moved["boxes"].unbind(1)
        torch.testing.assert_close(moved["area"], (x1 - x0) * (y1 - y0), rtol=1e-4, atol=1e-3)
        assert moved["orig_size"].tolist() == [height, width]
    assert target["boxes"].tolist() == [list(box), [0, 0, 1, 1]]  # the input is not changed


def test_a_plan_does_what_the_original_does_in_its_order():
    """Mirror, resize, cut, resize by torchvision; the flip is exchanged with steps behind it."""
    image = picture(140, 100)
    for plan in some_plans(100, 140):
        expected = functional.horizontal_flip(image) if plan.flip else image
        if plan.crop is not None:
            expected = functional.resize(expected, list(plan.first))
            top, left, height, width = plan.crop
            left = plan.first[1] - width - left if plan.flip else left
            expected = functional.crop(expected, top, left, height, width)
        expected = np.array(functional.resize(expected, list(plan.size)), dtype=int)
        found = np.array(plan(image, make_target([], 100, 140))[0], dtype=int)
        assert np.abs(found - expected).max() <= 2


def test_tensors_are_close_to_pillow():
    image = picture(140, 100)
    target = make_target([[10, 20, 60, 70]], 100, 140)
    for plan in some_plans(100, 140):
        pillow, boxes = plan(image, target)
        tensor, same = plan(as_tensor(image), target)
        assert tensor.dtype == torch.uint8
        apart = (as_tensor(pillow).int() - tensor.int()).abs()
        assert apart.max() <= 2
        assert torch.equal(boxes["boxes"], same["boxes"])


def test_crop_clips_and_drops_boxes():
    plan = Augmentation((80, 100), (20, 30, 40, 60), False, (40, 60))
    image = picture(100, 80)
    target = make_target(
        [
            [40, 30, 50, 50],  # inside
            [10, 10, 60, 40],  # over the top left corner
            [80, 50, 100, 80],  # over the bottom right corner
            [0, 0, 30, 80],  # left of it, sharing an edge
            [95, 0, 100, 10],  # outside
        ],
        80,
        100,
    )
    cropped, left = plan(image, target)
    np.testing.assert_array_equal(np.array(cropped), np.array(image)[20:60, 30:90])
    assert left["boxes"].tolist() == [[10, 10, 20, 30], [0, 0, 30, 20], [50, 30, 60, 40]]
    assert left["area"].tolist() == [200, 600, 100]
    assert left["labels"].tolist() == [10, 11, 12]
    assert left["iscrowd"].tolist() == [0, 0, 0]
    assert left["size"].tolist() == [40, 60]
    assert left["image_id"].tolist() == [7]


def test_flip_mirrors_boxes_and_pixels():
    image, target = picture(100, 40), make_target([[10, 5, 30, 25], [0, 0, 100, 40]], 40, 100)
    flipped, mirrored = Augmentation(None, None, True, (40, 100))(image, target)
    np.testing.assert_array_equal(np.array(flipped), np.array(image)[:, ::-1])
    assert mirrored["boxes"].tolist() == [[70, 5, 90, 25], [0, 0, 100, 40]]


def test_resize_scales_sides_and_areas_by_their_own_ratio():
    image, target = picture(100, 50), make_target([[10, 5, 30, 25]], 50, 100)
    resized, scaled = Augmentation(None, None, False, (75, 160))(image, target)
    assert scaled["boxes"].tolist() == [[16, 7.5, 48, 37.5]]
    torch.testing.assert_close(scaled["area"], torch.tensor([400 * 1.5 * 1.6]))
    expected = image.resize((160, 75), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.array(resized), np.array(expected))
