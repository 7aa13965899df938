# SPDX-License-Identifier: Apache-2.0
import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from detr_fast.data.coco import CocoAnnotations, CocoDetection, DatasetError
from detr_fast.data.labels import LabelMap
from detr_fast.data.validate import DataReport
from tests.data.coco_folder import CONTENT, as_read, edited, official, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture
def dataset(folder):
    return CocoDetection(folder, folder / "boxes.json", as_read)


def test_images_come_in_the_order_of_their_ids(dataset):
    assert len(dataset) == 3
    assert [int(dataset[i][1]["image_id"]) for i in range(3)] == [2, 5, 9]
    assert [int(dataset[i][0][0, 0, 0]) for i in range(3)] == [2, 5, 9]


def test_target_is_clamped_and_filtered(dataset):
    _, target = dataset[2]
    # without the crowd, the box of no width and the one outside
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [0.5, 0, 30, 20]]
    assert target["labels"].tolist() == [1, 0]  # "dog", "cat"
    assert target["area"].tolist() == [7.5, 590]  # as written; width * height where it is not
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["orig_size"].tolist() == target["size"].tolist() == [20, 30]
    types = {key: value.dtype for key, value in target.items()}
    floats = {key for key, dtype in types.items() if dtype == torch.float32}
    assert floats == {"boxes", "area"}
    assert set(types) - floats == {"labels", "image_id", "iscrowd", "orig_size", "size"}
    assert all(types[key] == torch.int64 for key in set(types) - floats)

    _, target = dataset[0]
    assert target["boxes"].tolist() == [[0, 4, 10, 7]]
    assert target["area"].tolist() == [90]


def test_an_image_without_boxes_is_kept(dataset):
    image, target = dataset[1]
    assert image.shape == (8, 16, 3)
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)


def test_class_names_and_count(dataset):
    assert dataset.class_names == {0: "cat", 1: "dog"}
    assert dataset.num_classes == 2
    assert dataset.category_ids == {0: 3, 1: 17}


def test_ground_truth_holds_every_box_of_the_listed_images(dataset):
    truth = dataset.ground_truth
    written = [a for a in CONTENT["annotations"] if a["image_id"] != 77]
    assert sorted(a["id"] for a in truth["annotations"]) == list(range(1, len(written) + 1))

    def rows(annotations):
        keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
        return sorted([a.get(key) for key in keys] for a in annotations)

    defaults = {"area": 590.0, "iscrowd": 0}
    assert rows(truth["annotations"]) == rows(defaults | a for a in written)
    assert truth["images"] == sorted(CONTENT["images"], key=lambda image: image["id"])
    assert truth["categories"] == CONTENT["categories"]
    assert json.loads(json.dumps(truth)) == truth  # plain numbers
    again = CocoAnnotations.from_dict(truth).to_dict()
    assert again == truth


def test_workers_receive_arrays_only(folder, dataset):
    content = copy.deepcopy(CONTENT)
    content["annotations"] *= 500
    (folder / "boxes.json").write_text(json.dumps(content))
    large = CocoDetection(folder, folder / "boxes.json", as_read)
    extra = len(pickle.dumps(large)) - len(pickle.dumps(dataset))
    assert extra / (499 * 6) < 60  # bytes per annotation: 7 numbers of 8 bytes
    _, target = pickle.loads(pickle.dumps(large))[2]
    assert len(target["boxes"]) == 1000


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "I;16"])
def test_every_image_mode_becomes_rgb(folder, mode):
    name = "two.tif"
    Image.new(mode, (10, 10), 1 if mode in ("1", "L", "P", "I;16") else 0).save(folder / name)
    content = copy.deepcopy(CONTENT)
    content["images"][1]["file_name"] = name
    (folder / "boxes.json").write_text(json.dumps(content))
    dataset = CocoDetection(folder, folder / "boxes.json", as_read)
    assert dataset[0][0].shape == (10, 10, 3)
    assert dataset.load_image(0).shape == (3, 10, 10)


def test_load_image_is_what_is_on_disk(folder, dataset):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "two.png")
    loaded = dataset.load_image(0)
    assert loaded.dtype == torch.uint8
    np.testing.assert_array_equal(loaded.numpy(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("annotations"), r"boxes\.json: no list 'annotations'"),
        (lambda c: c.update(images={}), r"no list 'images'"),
        (lambda c: c.update(images=[]), r"'images' is empty"),
        (lambda c: c.update(categories=[]), r"'categories' must list"),
        (lambda c: c["categories"][0].update(id=-1), r"'categories' must list ids of 0 or more"),
        (lambda c: c["categories"][0].update(id=17), r"category id 17 is listed more than once"),
        (lambda c: c["images"][2].pop("id"), r"images\[2\] needs 'id' \(a number\)"),
        (lambda c: c["images"][2].update(id=9), r"image id 9 is listed more than once"),
        (lambda c: c["images"][1].pop("file_name"), r"image id 2 has no 'file_name'"),
        (
            lambda c: c["annotations"][3].pop("bbox"),
            r"annotations\[3\] needs 'bbox' \(4 finite numbers\)",
        ),
        (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), r"annotations\[3\] needs 'bbox'"),
        (lambda c: c["annotations"][3].update(bbox=None), r"annotations\[3\] needs 'bbox'"),
        (
            lambda c: c["annotations"][3].update(bbox=[1, 2, 3, float("nan")]),
            r"annotations\[3\] needs 'bbox'",
        ),
        (lambda c: c["annotations"].append("box"), r"annotations\[7\] needs 'image_id'.*'box'"),
        (lambda c: c["annotations"][1].update(iscrowd="no"), r"annotations\[1\] needs 'iscrowd'"),
        (
            lambda c: c["annotations"][2].update(category_id=4),
            r"annotations\[2\] has category_id 4, which 'categories' does not list",
        ),
    ],
)
def test_malformed_content_is_named(folder, edit, message):
    (folder / "boxes.json").write_text(json.dumps(edited(edit)))
    with pytest.raises(DatasetError, match=message):
        CocoDetection(folder, folder / "boxes.json", as_read)


def test_unreadable_annotations_are_named(folder):
    with pytest.raises(DatasetError, match=r"none\.json: cannot be read \(No such file"):
        CocoDetection(folder, folder / "none.json", as_read)
    (folder / "boxes.json").write_text(json.dumps(CONTENT)[:-30])
    with pytest.raises(DatasetError, match=r"boxes\.json: no valid JSON .*is the copy complete"):
        CocoDetection(folder, folder / "boxes.json", as_read)
    (folder / "boxes.json").write_text("[1, 2]")
    with pytest.raises(DatasetError, match=r"boxes\.json: holds no JSON object"):
        CocoDetection(folder, folder / "boxes.json", as_read)
    with pytest.raises(DatasetError, match=r"elsewhere: no such image folder"):
        CocoDetection(folder / "elsewhere", folder / "boxes.json", as_read)


def test_missing_and_broken_images_are_named(folder, dataset):
    (folder / "two.png").unlink()
    with pytest.raises(DatasetError, match=r"two\.png: image id 2 is missing.*boxes\.json"):
        dataset[0]
    whole = (folder / "five.png").read_bytes()
    (folder / "five.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"five\.png: image id 5 cannot be decoded"):
        dataset.load_image(1)
    (folder / "nine.png").write_text("<html>not found</html>")
    with pytest.raises(DatasetError, match=r"nine\.png: image id 9 cannot be decoded"):
        dataset[2]


def test_error_of_a_worker_arrives_with_its_class(folder, dataset):
    (folder / "two.png").unlink()
    with pytest.raises(DatasetError) as caught:
        next(iter(DataLoader(dataset, num_workers=1)))
    *traceback, message = str(caught.value).splitlines()
    assert traceback[0].startswith("Caught DatasetError in DataLoader worker process 0")
    assert f"DatasetError: {folder}/two.png: image id 2 is missing; restore the file" in message


def test_labels_of_another_data_set_are_matched_by_name(folder):
    labels = LabelMap.from_categories({5: "bird", 6: "dog", 7: "cow"})
    report = DataReport("boxes.json")
    dataset = CocoDetection(folder, folder / "boxes.json", as_read, labels=labels, report=report)
    assert dataset.class_names == {0: "bird", 1: "dog", 2: "cow"}
    assert dataset.num_classes == 3
    assert dataset.category_ids == {1: 17}
    assert report.lines() == [
        "boxes.json: 5 annotations of classes that the training data does not have (left out): "
        "'cat' (image 2), 'cat' (image 9), 'cat' (image 9), ..."
    ]
    assert len(dataset) == 3
    assert dataset[2][1]["labels"].tolist() == [1]
    assert dataset[0][1]["labels"].tolist() == []
    truth = dataset.ground_truth
    assert truth["categories"] == [{"id": 17, "name": "dog"}]
    assert [a["category_id"] for a in truth["annotations"]] == [17]
    assert dataset.box_counts() == {0: 0, 1: 1, 2: 0}


def test_labels_that_share_no_name(folder):
    labels = LabelMap.from_categories(dict(enumerate("abcd")))
    with pytest.raises(
        DatasetError,
        match=r"none of its 2 classes \('cat', 'dog'\) is one of the 4 that the model knows "
        r"\('a', 'b', 'c', \.\.\.\); classes are matched by name",
    ):
        CocoDetection(folder, folder / "boxes.json", as_read, labels=labels)


def test_category_ids_may_be_any(folder):
    def edit(content):
        for old, new in ((3, 0), (17, 10**15)):
            for entry in content["categories"]:
                entry["id"] = new if entry["id"] == old else entry["id"]
            for entry in content["annotations"]:
                if entry["category_id"] == old:
                    entry["category_id"] = new

    dataset = CocoDetection(folder, CocoAnnotations.from_dict(edited(edit)), as_read)
    assert dataset[2][1]["labels"].tolist() == [1, 0]
    assert dataset.num_classes == 2
    assert dataset.category_ids == {0: 0, 1: 10**15}


def test_boxes_per_class_and_index_of_an_image(dataset):
    # boxes of cats: one of no width and a crowd do not count, one outside of its image does
    assert dataset.box_counts() == {0: 3, 1: 1}
    assert [dataset.index_of(i) for i in (9, 2, 5)] == [2, 0, 1]
    for unknown in (1, 3, 10):
        with pytest.raises(KeyError, match=f"no image id {unknown}"):
            dataset.index_of(unknown)


def test_unknown_way_with_unusable_images(folder):
    with pytest.raises(ValueError, match="unusable 'drop': choose raise, replace or skip"):
        CocoDetection(folder, folder / "boxes.json", as_read, unusable="drop")


@pytest.mark.parametrize(("image_set", "count"), [("train", 59), ("val", 66)])
def test_real_images_load_with_their_boxes(test_data, image_set, count):
    dataset = official(test_data / "coco125", image_set)
    assert len(dataset) == count
    assert dataset.num_classes == 91
    assert len(dataset.class_names) == 80

    path = test_data / f"coco125/annotations/instances_{image_set}2017.json"
    content = json.loads(path.read_text())
    images = sorted(content["images"], key=lambda image: image["id"])
    dataset.transforms = as_read
    for index, entry in enumerate(images):
        image, target = dataset[index]
        height, width = entry["height"], entry["width"]
        assert image.shape == (height, width, 3)
        assert int(target["image_id"]) == entry["id"]
        wanted = [
            a for a in content["annotations"] if a["image_id"] == entry["id"] and not a["iscrowd"]
        ]
        assert target["labels"].tolist() == [a["category_id"] for a in wanted]
        corners = [
            [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            for x, y, w, h in (a["bbox"] for a in wanted)
        ]
        np.testing.assert_allclose(
            target["boxes"].numpy(), np.array(corners).reshape(-1, 4), atol=1e-4
        )
    assert sum(len(dataset[i][1]["boxes"]) == 0 for i in range(count)) == (
        2 if image_set == "val" else 0
    )


def test_real_images_of_the_evaluation_have_the_official_size(test_data):
    dataset = official(test_data / "coco125", "val")
    image, target = dataset[0]  # 640 x 480
    assert image.shape == (3, 800, 1066)
    assert image.dtype == torch.float32
    assert target["boxes"].min() >= 0
    assert target["boxes"].max() <= 1
    row = dataset.annotations.starts[0]
    x, y, w, h = dataset.annotations.boxes[row]
    np.testing.assert_allclose(
        target["boxes"][0].numpy(),
        [(x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480],
        atol=1e-6,
    )
