# SPDX-License-Identifier: Apache-2.0
import copy
import json

import numpy as np
import pytest

from detr_fast.data.annotations import CocoAnnotations, DatasetError, read_json
from detr_fast.data.labels import COCO_CATEGORIES
from detr_fast.data.validate import DataReport
from tests.data.dirty_content import (
    BOXES,
    CONTENT,
    HUGE,
    box,
    category,
    image,
    kept_ids,
    more,
    read,
)


def test_categories_that_are_listed_again():
    annotations, report = read(more("categories", id=9, name="dog"))
    assert report.lines() == [
        "boxes.json: 1 categories that are listed again (left out): category 9"
    ]
    assert annotations.class_names == {0: "cat", 9: "dog"}


@pytest.mark.parametrize("name", [None, "", "  ", 5, ["dog"], HUGE])
def test_category_without_a_name_is_called_by_its_id(name):
    annotations, report = read(category(1, name=name))
    assert report.lines() == []
    assert annotations.class_names == {0: "cat", 9: "9"}


def test_category_names_become_printable():
    annotations, _ = read(category(1, name="\x1b[31mdög\n\ud800"))
    assert annotations.class_names[9] == "\\x1b[31mdög\\n\\ud800"


@pytest.mark.parametrize("with_report", [True, False])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(categories=[]), "'categories' must list at least one class"),
        (more("categories", id=9, name="cow"), "category id 9 .*, as 'dog' and 'cow'; give each"),
        (more("categories", name="cow"), "must list ids of 0 or more, found {'name': 'cow'}"),
        (category(0, id=-1), "'categories' must list ids of 0 or more"),
        (category(0, id="0"), "'categories' must list ids of 0 or more"),
        (lambda c: c["categories"].append(3), "'categories' must list ids of 0 or more, found 3"),
        (lambda c: c.pop("images"), "no list 'images'; expected a COCO instances file"),
        (lambda c: c.update(annotations=None), "no list 'annotations'"),
        (lambda c: c.update(categories={"1": "cat"}), "no list 'categories'"),
    ],
)
def test_what_makes_a_data_set_useless(edit, message, with_report):
    content = copy.deepcopy(CONTENT)
    edit(content)
    report = DataReport("boxes.json") if with_report else None
    with pytest.raises(DatasetError, match=f"^boxes.json: .*{message}"):
        CocoAnnotations.from_dict(content, "boxes.json", report)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (image(1, file_name="../5.png"), "image id 5: 'file_name' '../5.png' leaves the"),
        (image(1, file_name=5), r"images\[1\] needs 'file_name' \(a text of at most 1024"),
        (image(1, height="x"), r"images\[1\] needs 'height' \(a number of pixels\)"),
        (box(1, area="x"), r"annotations\[1\] needs 'area' \(a number of 0 or more\)"),
        (box(1, category_id=HUGE), r"annotations\[1\] needs 'category_id' \(a number\)"),
        (box(1, bbox=[1, 2, 3, 10**5000]), r"annotations\[1\] needs 'bbox' .*, found a large dict"),
        (more("categories", id=9, name="dog"), "category id 9 is listed more than once"),
    ],
)
def test_first_fault_is_an_error_without_a_report(edit, message):
    content = copy.deepcopy(CONTENT)
    edit(content)
    with pytest.raises(DatasetError, match=f"^boxes.json: {message}"):
        CocoAnnotations.from_dict(content, "boxes.json")


def test_boxes_are_kept_as_written_without_a_report():
    content = copy.deepcopy(CONTENT)
    content["annotations"] += [
        {"image_id": 5, "category_id": 0, "bbox": bbox, "id": 21}
        for bbox in ([0, 0, -2, 3], [900, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4])
    ]
    annotations = CocoAnnotations.from_dict(content)
    assert annotations.boxes[2:7].tolist() == [
        [1, 2, 3, 4], [0, 0, -2, 3], [900, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4],
    ]  # fmt: skip
    assert annotations.areas[2:7].tolist() == [12, 6, 1, 12, 12]
    assert annotations.box_counts() == {0: 5, 9: 1}  # -2 x 3 is none to learn from
    assert CocoAnnotations.from_dict(annotations.to_dict()).boxes.tolist() == (
        annotations.boxes.tolist()
    )


def roboflow(group="animals", **dummy):
    def edit(content):
        content["categories"][0]["supercategory"] = content["categories"][1]["supercategory"] = (
            group
        )
        content["categories"].insert(
            0, {"id": 3, "name": "animals", "supercategory": "none"} | dummy
        )

    return edit


def test_category_that_only_groups_others_is_no_class():
    annotations, report = read(roboflow())
    assert annotations.class_names == {0: "cat", 9: "dog"}
    assert report.lines() == []
    assert report.notes == [
        "boxes.json: category 3 'animals' is no class: it has no annotation and is the "
        "supercategory of ['cat', 'dog']",
    ]
    assert len(annotations.boxes) == 4


@pytest.mark.parametrize(
    "edit",
    [
        roboflow("none"),  # nobody's supercategory
        roboflow(supercategory="cat"),  # a class of its own kind in a hierarchy
        lambda c: (roboflow()(c), box(0, category_id=3)(c)),  # it has a box
    ],
)
def test_category_that_may_be_a_class_is_kept(edit):
    annotations, report = read(edit)
    assert set(annotations.class_names) == {0, 3, 9}
    assert report.notes == []
    assert report.lines() == []


def test_category_that_is_its_own_supercategory_is_a_class():
    content = copy.deepcopy(CONTENT)
    content["annotations"] = []
    content["categories"] = [{"id": 1, "name": "person", "supercategory": "person"}]
    assert CocoAnnotations.from_dict(content).class_names == {1: "person"}
    content["categories"].append({"id": 1, "name": "person", "supercategory": "x"})
    report = DataReport("repeated")
    assert CocoAnnotations.from_dict(content, "", report).class_names == {1: "person"}
    assert len(report) == 1
    content["categories"] = [
        {"id": 1, "name": "a", "supercategory": "b"},
        {"id": 2, "name": "b", "supercategory": "a"},
    ]
    assert CocoAnnotations.from_dict(content).class_names == {1: "a", 2: "b"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_official_files_are_without_fault(test_data, split):
    path = test_data / f"coco125/annotations/instances_{split}2017.json"
    content = read_json(path)
    content["annotations"] = content["annotations"][:1]
    report = DataReport(str(path))
    annotations = CocoAnnotations.from_dict(content, str(path), report)
    assert annotations.class_names == COCO_CATEGORIES
    assert (report.notes, report.lines()) == ([], [])


def test_faults_of_one_kind_are_counted_and_the_first_named():
    def edit(content):
        for i in range(31, 36):
            more("annotations", id=i, image_id=5, category_id=0, bbox=[0, 0, 0, 0])(content)

    annotations, report = read(edit)
    assert report.lines() == [
        "boxes.json: 5 boxes whose width or height is not above 0 (left out): annotation 31 "
        "(image 5, 5.png), annotation 32 (image 5, 5.png), annotation 33 (image 5, 5.png), ..."
    ]
    assert len(annotations.boxes) == 4


def test_an_annotation_is_counted_once():
    _, report = read(box(0, bbox=[99, 99, 0, 0], category_id=4, image_id="x", area=-1))
    assert len(report) == 1


def test_a_single_odd_value_changes_no_other_value():
    """Others are converted as if it were not there."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 4, (50, 4)).tolist()
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": b} for i, b in enumerate(boxes)
        ],
    }
    for odd in (None, HUGE, [None] * 4, [HUGE, 1, 1, 1]):
        content["annotations"][20]["bbox"] = odd
        annotations = CocoAnnotations.from_dict(content, report=DataReport("x"))
        assert annotations.boxes.tolist() == boxes[:20] + boxes[21:]


def test_values_of_numpy_are_numbers():
    content = copy.deepcopy(CONTENT)
    for entry in content["images"]:
        entry["id"] = np.int64(entry["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = np.int32(annotation["image_id"])
        annotation["category_id"] = np.uint8(annotation["category_id"])
        annotation["area"] = np.float32(annotation.get("area", 8))
        annotation["bbox"] = np.array(annotation["bbox"])
    content["annotations"][0]["bbox"] = (1, 2, np.float32(3), np.int64(4))
    report = DataReport("boxes.json")
    annotations = CocoAnnotations.from_dict(content, "boxes.json", report)
    assert report.lines() == []
    assert annotations.boxes.tolist() == [BOXES[i] for i in (22, 24, 21, 23)]
    assert annotations.areas.tolist() == [150, 8, 8, 8]
    assert annotations.owners.tolist() == [2, 2, 5, 7]


def test_keep_images():
    annotations, _ = read(lambda c: None)
    some = annotations.keep_images(np.array([True, False, True]))
    assert some.image_ids.tolist() == [2, 7]
    assert some.file_names.tolist() == ["2.png", "7.png"]
    assert some.starts.tolist() == [0, 2, 3]
    assert kept_ids(some) == [22, 23, 24]
    assert some.owners.tolist() == [2, 2, 7]
    assert some.class_names == annotations.class_names
    last = annotations.keep_images(np.array([False, True, True]))
    assert last.starts.tolist() == [0, 1, 2]
    assert kept_ids(last) == [21, 23]


def test_keep_categories():
    annotations, _ = read(lambda c: None)
    some = annotations.keep_categories([0])
    assert some.image_ids.tolist() == [2, 5, 7]
    assert some.starts.tolist() == [0, 1, 2, 2]
    assert kept_ids(some) == [21, 24]
    assert some.class_names == {0: "cat"}
    assert some.labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty; write or copy it again"),
        (b" \n", "is empty"),
        (b'{"images": [', "no valid JSON .*is the copy complete"),
        (b'{"a": 1} {"a": 1}', "no valid JSON"),
        (b"[1, 2]", "holds no JSON object; expected"),
        (b"null", "holds no JSON object"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b"[" * 200_000, "no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "boxes.json"
    path.write_bytes(text)
    with pytest.raises(DatasetError, match=f"boxes.json: {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_that_can_be_read(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "ö"}).encode())  # with a byte-order mark
    assert read_json(path) == {"a": "ö"}
    with pytest.raises(DatasetError, match=r"none\.json: cannot be read \(No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DatasetError, match=r"cannot be read \(Is a directory"):
        read_json(tmp_path)
