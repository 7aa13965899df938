# SPDX-License-Identifier: Apache-2.0
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data.augmentation import MAX_SIZE, SCALES, resized_size
from detr_fast.data.transforms import eval_transforms, normalize, train_transforms
from detr_fast.ops.image import normalize_images
from detr_fast.reference.image import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)


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


def test_normalize_accepts_bytes_and_floats():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    channels_last = pixels.numpy().transpose(0, 2, 3, 1)
    expected = ((channels_last / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
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
    expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)

    box = [0.25 * width, 0.5 * height, 0.75 * width, height]
    pixels, target = eval_transforms()(image, make_target([box], height, width))
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(target["boxes"].numpy(), [[0.5, 0.75, 0.5, 0.5]], atol=1e-6)
    assert target["size"].tolist() == list(pixels.shape[1:])
    assert target["orig_size"].tolist() == [height, width]


def test_an_image_without_boxes():
    pixels, target = eval_transforms()(picture(20, 10), make_target([], 10, 20))
    assert pixels.shape == (3, 666, 1332)
    assert target["boxes"].shape == (0, 4)


def test_evaluation_takes_a_byte_tensor_too():
    image = picture(64, 48)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    target = make_target([[0, 0, 10, 10]], 48, 64)
    expected, _ = eval_transforms()(image, target)
    assert torch.equal(eval_transforms()(pixels, target)[0], expected)
    resized, _ = eval_transforms(pixels="uint8")(pixels, target)
    assert resized.dtype == torch.uint8
    # the two implementations round to bytes: one step of 255 apart at most
    difference = (normalize(resized) - expected).abs().max()
    assert 0 < difference <= 1.01 / 255 / min(STD)


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


def test_a_seed_stands_in_for_the_generator():
    image, target = picture(80, 60), make_target([[10, 10, 70, 50]], 60, 80)
    transform = train_transforms()
    first, again = transform(image, target, 7), transform(image, target, 7)
    assert torch.equal(first[0], again[0])
    sizes = {transform(image, target, seed)[0].shape for seed in range(20)}
    assert len(sizes) > 10
    whole = {eval_transforms()(image, target, seed)[0].shape for seed in range(3)}
    assert len(whole) == 1  # nothing to draw


@pytest.mark.parametrize("transforms", [train_transforms, eval_transforms])
def test_bytes_normalised_on_the_device_are_the_floats(transforms):
    image = torch.from_numpy(np.array(picture(80, 60))).permute(2, 0, 1)
    target = make_target([[10, 10, 70, 50]], 60, 80)
    for seed in range(6):
        floats, boxes = transforms(320)(image, target, seed)
        pixels, same_boxes = transforms(320, "uint8")(image, target, seed)
        assert pixels.dtype == torch.uint8
        on_device = normalize_images(pixels[None])[0]
        # pillow and torch round the resize to bytes each in its way
        torch.testing.assert_close(on_device, floats, atol=1.01 / 255 / min(STD), rtol=0)
        assert torch.equal(boxes["boxes"], same_boxes["boxes"])


def test_bytes_of_a_pillow_image_are_resized_by_torch():
    """A few bytes apart from pillow's own resize, by one step."""
    image, target = picture(80, 60), make_target([[10, 10, 70, 50]], 60, 80)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels, _ = eval_transforms(320, "uint8")(image, target)
    assert torch.equal(pixels, eval_transforms(320, "uint8")(tensor, target)[0])
    by_pillow, _ = eval_transforms(320)(image, target)
    # noise is the hardest of images: a photo differs less
    apart = (normalize(pixels) - by_pillow).abs() * 255 * max(STD)
    assert apart.max() < 1.1 * max(STD) / min(STD)


def test_unknown_pixels_are_refused():
    with pytest.raises(ValueError, match="pixels 'float16': choose float32 or uint8"):
        train_transforms(pixels="float16")
