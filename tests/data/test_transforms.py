# SPDX-License-Identifier: Apache-2.0
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.transforms import (
    MAX_SIZE,
    MEAN,
    SCALES,
    STD,
    RandomHorizontalFlip,
    RandomSizeCrop,
    Resize,
    ToModelInput,
    eval_transforms,
    normalize,
    resized_size,
    train_transforms,
)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_target(boxes, height, width):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": boxes,
        "labels": torch.arange(len(boxes)) + 10,
        "image_id": torch.tensor([7]),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }


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


def test_flip_mirrors_boxes_and_pixels():
    image = picture(100, 40)
    target = make_target([[10, 5, 30, 25], [0, 0, 100, 40]], 40, 100)
    flipped, mirrored = RandomHorizontalFlip(1.0)(image, target)
    np.testing.assert_array_equal(np.array(flipped), np.array(image)[:, ::-1])
    assert mirrored["boxes"].tolist() == [[70, 5, 90, 25], [0, 0, 100, 40]]
    assert target["boxes"].tolist()[0] == [10, 5, 30, 25]  # the input is not changed

    same, untouched = RandomHorizontalFlip(0.0)(image, target)
    assert same is image
    assert untouched is target


def test_resize_scales_boxes_and_areas():
    image, target = picture(100, 50), make_target([[10, 5, 30, 25]], 50, 100)
    resized, scaled = Resize((75,))(image, target)
    assert resized.size == (150, 75)
    assert scaled["boxes"].tolist() == [[15, 7.5, 45, 37.5]]
    assert scaled["area"].tolist() == [400 * 2.25]
    assert scaled["size"].tolist() == [75, 150]
    assert scaled["orig_size"].tolist() == [50, 100]
    expected = image.resize((150, 75), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.array(resized), np.array(expected))


def test_resize_scales_sides_by_their_own_ratio():
    resized, scaled = Resize((800,), MAX_SIZE)(
        picture(641, 480), make_target([[0, 0, 641, 480]], 480, 641)
    )
    assert resized.size == (1068, 800)
    assert scaled["boxes"].tolist() == [[0, 0, 1068, 800]]


def test_crop_clips_and_drops_boxes(monkeypatch):
    draws = iter([60, 40, 20, 30])  # width, height, top, left
    monkeypatch.setattr("detr_fast.data.transforms._draw", lambda low, high: next(draws))
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
    cropped, left = RandomSizeCrop(40, 60)(image, target)
    np.testing.assert_array_equal(np.array(cropped), np.array(image)[20:60, 30:90])
    assert left["boxes"].tolist() == [[10, 10, 20, 30], [0, 0, 30, 20], [50, 30, 60, 40]]
    assert left["area"].tolist() == [200, 600, 100]
    assert left["labels"].tolist() == [10, 11, 12]
    assert left["iscrowd"].tolist() == [0, 0, 0]
    assert left["size"].tolist() == [40, 60]
    assert left["image_id"].tolist() == [7]


def test_crop_sizes_and_places_fill_their_ranges():
    torch.manual_seed(0)
    image, target = Image.new("RGB", (12, 30)), make_target([[0, 0, 12, 30]], 30, 12)
    crop = RandomSizeCrop(8, 16)
    sizes = [crop(image, target)[0].size for _ in range(600)]
    assert {w for w, _ in sizes} == set(range(8, 13))  # the image ends before the maximum
    assert {h for _, h in sizes} == set(range(8, 17))

    corner = Image.new("RGB", (12, 30))
    corner.putpixel((11, 29), (255, 255, 255))
    seen = [np.array(crop(corner, target)[0])[-1, -1, 0] for _ in range(600)]
    assert 0 < np.count_nonzero(seen) < 60  # the last row and column can be reached


def test_crop_keeps_a_side_that_is_too_short():
    cropped, _ = RandomSizeCrop(384, 600)(picture(500, 100), make_target([], 100, 500))
    assert cropped.height == 100
    assert 384 <= cropped.width <= 500


def test_model_input_of_an_image_without_boxes():
    pixels, target = ToModelInput()(picture(20, 10), make_target([], 10, 20))
    assert pixels.shape == (3, 10, 20)
    assert target["boxes"].shape == (0, 4)


def test_normalize_accepts_bytes_and_floats():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = np.array(MEAN), np.array(STD)
    channels_last = pixels.numpy().transpose(0, 2, 3, 1)
    expected = ((channels_last / 255 - mean) / std).transpose(0, 3, 1, 2)
    for image in (pixels, pixels.float() / 255, pixels.double() / 255):
        before = image.clone()
        np.testing.assert_allclose(normalize(image).numpy(), expected, atol=2e-6)
        assert torch.equal(image, before)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (427, 640), (100, 400)])
def test_evaluation_equals_pil_and_numpy(width, height):
    image = picture(width, height)
    short = min(800, round(1333 * min(width, height) / max(width, height)))
    landscape = (short * width // height, short)
    new = (short, short * height // width) if width < height else landscape
    resized = np.asarray(image.resize(new, Image.Resampling.BILINEAR), dtype=np.float64)
    expected = ((resized / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)

    box = [0.25 * width, 0.5 * height, 0.75 * width, height]
    pixels, target = eval_transforms()(image, make_target([box], height, width))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(target["boxes"].numpy(), [[0.5, 0.75, 0.5, 0.5]], atol=1e-6)
    assert target["size"].tolist() == list(pixels.shape[1:])
    assert target["orig_size"].tolist() == [height, width]


def test_evaluation_takes_a_byte_tensor_too():
    image = picture(64, 48)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    target = make_target([[0, 0, 10, 10]], 48, 64)
    from_pil, _ = eval_transforms()(image, target)
    from_tensor, _ = eval_transforms()(pixels, target)
    # the two implementations round to bytes: one step of 255 apart at most
    assert (from_pil - from_tensor).abs().max() <= 1.01 / 255 / min(STD)


def augmented_shapes(count, width, height):
    """Sizes of the resized image and shares of a box that covers the whole image."""
    transform, image = train_transforms(), Image.new("RGB", (width, height))
    results = (
        transform(image, make_target([[0, 0, width, height]], height, width)) for _ in range(count)
    )
    return [(tuple(pixels.shape[1:]), target["boxes"][0].tolist()) for pixels, target in results]


def test_training_sizes_are_those_of_the_original():
    torch.manual_seed(0)
    count = 150
    whole = {resized_size(60, 80, scale, MAX_SIZE) for scale in SCALES}
    allowed_crops = {
        resized_size(h, w, scale, MAX_SIZE)
        for h in range(384, 601)
        for w in range(384, 601)
        for scale in SCALES
    }
    shapes = [size for size, _ in augmented_shapes(count, 80, 60)]
    assert all(size in whole or size in allowed_crops for size in shapes)
    assert {min(size) for size in shapes} == set(SCALES)
    # 4 : 3 as given; crops of 384 to 600 pixels reach from 16 : 25 to 25 : 16
    assert max(w / h for h, w in shapes) > 1.4
    assert min(w / h for h, w in shapes) < 0.9
    uncropped = sum(size in whole for size in shapes)
    # a crop may by chance have a size of the whole image: a little over one half
    assert 0.35 * count < uncropped < 0.7 * count


def test_training_boxes_stay_within_the_image():
    torch.manual_seed(1)
    for _, (x, y, w, h) in augmented_shapes(30, 80, 60):
        assert x - w / 2 > -1e-6
        assert y - h / 2 > -1e-6
        assert x + w / 2 < 1 + 1e-6
        assert y + h / 2 < 1 + 1e-6


def test_training_is_determined_by_the_seed_of_torch():
    image, target = picture(80, 60), make_target([[10, 10, 70, 50]], 60, 80)
    transform = pickle.loads(pickle.dumps(train_transforms()))  # as a spawned worker gets it

    def draw(seed):
        torch.manual_seed(seed)
        return [transform(image, target) for _ in range(3)]

    first, second = draw(3), draw(3)
    for (pixels, boxes), (pixels_again, boxes_again) in zip(first, second, strict=True):
        assert torch.equal(pixels, pixels_again)
        assert torch.equal(boxes["boxes"], boxes_again["boxes"])
    assert any(a.shape != b.shape for (a, _), (b, _) in zip(first, draw(4), strict=True))
