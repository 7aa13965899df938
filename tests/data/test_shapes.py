# SPDX-License-Identifier: Apache-2.0
"""The generated data set: its promises, counted over all pictures, and its pixels, by hash."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detr_fast.data import collate
from detr_fast.data.augmentation import draw_flip
from detr_fast.data.sampler import Draw
from detr_fast.data.shapes import CLASS_NAMES, SEEDS, SIDE, ShapesDetection, _Random, generate
from detr_fast.data.transforms import normalize

SMALL = 24  # pixels of the longest side
OCCLUDED = 0.95  # an object counts as occluded when less of it can be seen

# sha256 over pixels, boxes and labels: shapes-v1 is what has these, on every platform
FROZEN = {
    ("train", 0): "6a75d9e92a5e5cc9b1025bbd6fcb433f0c76e1f6b32155acf0186f72ca45ea84",
    ("train", 1): "dc99fa546cef0934fee68e2ae3bd5712656172b50d65ad32889bc5460a075c51",
    ("train", 2): "4fafd3a1fb5b5a1d89b2ca6434a9fac46c136bc2025c6b3d83c961021e2d4579",
    ("train", 777): "0fa772e4fdb85d30f5b7570edf0b251f9ff7c3f78524c415d1519f7e82c5f32a",
    ("train", 1999): "61413b4e88de7360c56ea3f5795f71abc489e208d571bbd9dce57c55dd4428e0",
    ("val", 0): "c7d3e0f0bc35b5f629805f1aadea79ab60d576e6f152b8de030d4d270635d1e3",
    ("val", 1): "98bdfeb191cde610fa629ce8830b8bb303acc53df81063eb1b297dc9f7448bc7",
    ("val", 499): "11c82aaf3bee56f4b34baa79b5fdf331c4fe0fb4d80cdf5bcf9c9c839b29d7fa",
}


def fingerprint(picture):
    digest = hashlib.sha256(picture.image.tobytes())
    for values in (picture.boxes, picture.labels):
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()


def box_of(mask):
    """Tight extent by the definition: the pixels' smallest and largest coordinates."""
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def assert_same(item, other):
    assert torch.equal(item[0], other[0])
    assert item[1].keys() == other[1].keys()
    assert all(torch.equal(item[1][name], other[1][name]) for name in item[1])


@pytest.fixture(scope="module")
def pictures():
    """All 2,500 pictures."""
    lengths = {"train": 2000, "val": 500}
    return {s: [generate(SEEDS[s], i) for i in range(n)] for s, n in lengths.items()}


def test_splitmix_gives_the_published_stream():
    """First outputs of SplitMix64 from state 0 and 1234567, as in the reference implementation."""
    random = _Random(0, 0)
    random._state = np.zeros(1, dtype=np.uint64)
    assert random.words(2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    random._state, random._used = np.array([1234567], dtype=np.uint64), 0
    assert random.words(2).tolist() == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize(("image_set", "index"), FROZEN)
def test_pictures_are_frozen(image_set, index):
    assert fingerprint(generate(SEEDS[image_set], index)) == FROZEN[image_set, index]


@pytest.mark.parametrize("image_set", SEEDS)
def test_statistics(pictures, image_set):
    chosen = pictures[image_set]
    counts = np.array([len(p.labels) for p in chosen])
    assert counts.min() == 1
    assert counts.max() == 6
    assert np.bincount(counts)[1:].min() > 0.05 * len(chosen)  # every number of objects occurs

    labels = np.concatenate([p.labels for p in chosen])
    assert len(CLASS_NAMES) >= 4
    assert sorted(CLASS_NAMES) == np.unique(labels).tolist()
    assert np.bincount(labels).min() > 0.2 * len(labels)  # classes are balanced

    boxes = np.concatenate([p.boxes for p in chosen])
    assert boxes.min() >= 0
    assert boxes.max() <= SIDE
    longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert 0.15 <= (longest < SMALL).mean() <= 0.3
    assert longest.min() >= 8
    assert 55 <= longest.max() <= 64

    shown = [
        np.array([(p.owner == k).sum() for k in range(len(p.labels))]) / p.areas for p in chosen
    ]
    assert np.mean([(s < OCCLUDED).any() for s in shown]) >= 0.2
    assert min(s.min() for s in shown) >= 0.7  # never mostly hidden


def test_boxes_are_the_extent_of_the_visible_pixels(pictures):
    for picture in pictures["val"]:
        expected = [box_of(picture.owner == k) for k in range(len(picture.labels))]
        assert picture.boxes.tolist() == expected


def test_objects_stand_out_from_textured_ground(pictures):
    """The ground varies, clutter is there, and yet objects differ from what is around them."""
    contrasts, spreads = [], []
    for picture in pictures["val"][:100]:
        image = picture.image.astype(float)
        ground = image[picture.owner < 0]
        spreads.append(ground.std(axis=0).mean())
        for k in range(len(picture.labels)):
            mean = image[picture.owner == k].mean(axis=0)
            contrasts.append(np.abs(mean - np.median(ground, axis=0)).sum())
    assert np.quantile(spreads, 0.02) > 4
    assert np.quantile(contrasts, 0.02) > 60


def test_sets_share_no_picture(pictures):
    digests = [p.image.tobytes() for chosen in pictures.values() for p in chosen]
    assert len(set(digests)) == 2500


def test_items_do_not_depend_on_the_order_of_access():
    forward, backward = (ShapesDetection("val", length=5) for _ in range(2))
    ahead = [forward[i] for i in range(5)]
    back = [backward[i] for i in reversed(range(5))][::-1]
    for item, other in zip([*ahead, forward[3]], [*back, ahead[3]], strict=True):
        assert_same(item, other)


@pytest.mark.parametrize(("image_set", "length"), [("train", 2000), ("val", 500)])
def test_lengths(image_set, length):
    assert len(ShapesDetection(image_set)) == length
    assert len(ShapesDetection(image_set, length=7)) == 7


def test_items():
    data = ShapesDetection("val", length=3)
    picture = generate(SEEDS["val"], 2)
    image, target = data[2]
    pixels = torch.from_numpy(picture.image).permute(2, 0, 1)
    assert torch.equal(data.load_image(2), pixels)
    assert image.dtype == torch.float32
    assert_close(image, normalize(pixels))
    x0, y0, x1, y1 = torch.from_numpy(picture.boxes).float().unbind(1)
    expected = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1) / SIDE
    assert_close(target["boxes"], expected, rtol=0, atol=0)
    assert_close(target["area"], (x1 - x0) * (y1 - y0), rtol=0, atol=0)
    assert target["labels"].tolist() == picture.labels.tolist()
    assert target["labels"].dtype == torch.int64
    assert target["image_id"].tolist() == [2]
    assert target["iscrowd"].tolist() == [0] * len(x0)
    assert target["orig_size"].tolist() == target["size"].tolist() == [SIDE, SIDE]
    assert_same(data[-1], data[2])
    with pytest.raises(IndexError):
        data[3]


def test_items_collate():
    data = ShapesDetection("train", length=3)
    batch, targets = collate([data[i] for i in range(3)])
    assert batch.tensors.shape == (3, 3, SIDE, SIDE)
    assert not batch.mask.any()
    assert [t["image_id"].item() for t in targets] == [0, 1, 2]


def test_mirrored_boxes_are_exact():
    """About half of the items are mirrored, their boxes those of the mirrored masks."""
    data = ShapesDetection("train", length=20)
    plain = ShapesDetection("train", augment=False, length=20)
    torch.manual_seed(0)
    mirrored = 0
    for index in range(20):
        owner = generate(SEEDS["train"], index).owner
        image, target = data[index]
        upright = plain[index][0]
        if not torch.equal(image, upright):
            mirrored += 1
            assert torch.equal(image, upright.flip(-1))
            owner = owner[:, ::-1]
        corners = [box_of(owner == k) for k in range(owner.max() + 1)]
        centre, size = (target["boxes"] * SIDE).split(2, dim=1)
        assert torch.cat([centre - size / 2, centre + size / 2], dim=1).tolist() == corners
    assert 4 <= mirrored <= 16


def test_bytes_are_the_pictures_that_floats_are_normalised_from():
    floats, data = (ShapesDetection("train", length=8, pixels=p) for p in ("float32", "uint8"))
    for seed in range(8):
        image, target = floats[Draw(seed, seed)]
        pixels, same = data[Draw(seed, seed)]
        assert pixels.dtype == torch.uint8
        assert torch.equal(normalize(pixels), image)  # bit by bit
        assert_same((image, target), (image, same))
        pixels.zero_()  # the caller's own
        assert torch.equal(normalize(data[Draw(seed, seed)][0]), image)


def test_a_draw_decides_on_the_mirror():
    data, val = (ShapesDetection(image_set, length=1) for image_set in ("train", "val"))
    plain = ShapesDetection("train", augment=False, length=1)[0][0]
    mirrored = [not torch.equal(data[Draw(0, seed)][0], plain) for seed in range(200)]
    assert mirrored == [draw_flip(seed) for seed in range(200)]
    assert 70 < sum(mirrored) < 130
    assert_same(val[Draw(0, mirrored.index(True))], val[0])


def test_val_is_not_mirrored_by_default():
    data = ShapesDetection("val", length=1)
    assert len({data[0][0].numpy().tobytes() for _ in range(10)}) == 1


def test_ground_truth_is_coco():
    data = ShapesDetection("val", length=4)
    truth = data.ground_truth
    assert [image["id"] for image in truth["images"]] == [0, 1, 2, 3]
    assert all((i["width"], i["height"]) == (SIDE, SIDE) for i in truth["images"])
    assert len({image["file_name"] for image in truth["images"]}) == 4
    assert {c["id"]: c["name"] for c in truth["categories"]} == data.class_names
    assert data.num_classes == max(data.class_names) + 1
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    for index in range(4):
        picture = generate(SEEDS["val"], index)
        ours = [a for a in truth["annotations"] if a["image_id"] == index]
        assert [a["category_id"] for a in ours] == picture.labels.tolist()
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in ours)]
        assert corners == picture.boxes.tolist()
        assert [a["area"] for a in ours] == [a["bbox"][2] * a["bbox"][3] for a in ours]
        assert {a["iscrowd"] for a in ours} == {0}


def test_labels_are_category_ids_and_indices_image_ids():
    data = ShapesDetection("val", length=5)
    labels = [label for _, target in data for label in target["labels"].tolist()]
    assert data.box_counts() == {label: labels.count(label) for label in data.class_names}
    assert data.category_ids == {label: label for label in data.class_names}
    assert [data.index_of(int(target["image_id"])) for _, target in data] == list(range(5))
    for unknown in (-1, 5):
        with pytest.raises(KeyError, match=f"no image id {unknown}"):
            data.index_of(unknown)


def test_data_set_goes_to_workers():
    data = pickle.loads(pickle.dumps(ShapesDetection("val", length=2)))
    assert_same(data[1], ShapesDetection("val", length=2)[1])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\['train', 'val'\], got 'test'"):
        ShapesDetection("test")
    with pytest.raises(ValueError, match="pixels 'bytes': choose float32 or uint8"):
        ShapesDetection("val", pixels="bytes")
    for length in (0, 501):
        with pytest.raises(ValueError, match=rf"1\.\.500 for 'val', got {length}"):
            ShapesDetection("val", length=length)
