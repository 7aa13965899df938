# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

from detr_fast.data.coco_format import leaves_folder
from tests.data.dirty_content import BOXES, CONTENT, HUGE, NAN, box, image, kept_ids, more, read


def test_clean_content_has_nothing_to_report():
    annotations, report = read(lambda c: None)
    assert report.lines() == []
    assert report.notes == []
    assert annotations.image_ids.tolist() == [2, 5, 7]
    assert annotations.sizes.tolist() == [[10, 20], [30, 30], [0, 0]]
    assert annotations.starts.tolist() == [0, 2, 3, 4]
    assert annotations.boxes.tolist() == [BOXES[i] for i in (22, 24, 21, 23)]
    assert annotations.labels.tolist() == [9, 0, 0, 9]
    assert annotations.areas.tolist() == [150, 25, 12, 4]
    assert annotations.crowds.tolist() == [0, 0, 0, 1]
    assert annotations.box_counts() == {0: 2, 9: 1}
    assert annotations.source == "boxes.json"


@pytest.mark.parametrize(
    ("edit", "kept", "line"),
    [
        *(
            (
                box(0, bbox=bbox),
                [22, 23, 24],
                "1 annotations without 4 finite numbers as 'bbox' (left out): "
                "annotation 21 (image 5, 5.png)",
            )
            for bbox in (
                None,
                [1, 2, 3],
                [1, 2, 3, NAN],
                [1, 2, 3, float("inf")],
                [1, 2, 3, HUGE],
                [1, 2, 3, 3e9],
                [1, 2, 3, "4"],
                [1, 2, 3, True],
                [[1, 2, 3, 4]],
                "1234",
                {"x": 1, "y": 2, "w": 3, "h": 4},
                7,
            )
        ),
        *(
            (
                box(0, bbox=bbox),
                [22, 23, 24],
                "1 boxes whose width or height is not above 0 (left out): "
                "annotation 21 (image 5, 5.png)",
            )
            for bbox in ([1, 2, 0, 4], [1, 2, 3, 0], [1, 2, -3, 4])
        ),
        *(
            (
                box(0, bbox=bbox),
                [22, 23, 24],
                "1 boxes outside of their image (left out): annotation 21 (image 5, 5.png)",
            )
            for bbox in ([30, 2, 3, 4], [1, 30, 3, 4], [-3, 2, 3, 4], [1, -9, 3, 4])
        ),
        (
            box(0, category_id=4),
            [22, 23, 24],
            "1 annotations of categories that are not listed (left out): "
            "annotation 21 (image 5, 5.png)",
        ),
        (
            box(0, image_id=6),
            [22, 23, 24],
            "1 annotations of images that are not listed (left out): annotation 21 (image 6)",
        ),
        *(
            (
                box(0, image_id=image_id),
                [22, 23, 24],
                "1 annotations without a number as 'image_id' (left out): annotation 21",
            )
            for image_id in (None, "5", 5.5, True, [5], 2**63, HUGE, NAN, float("inf"))
        ),
        *(
            (
                box(0, category_id=category_id),
                [22, 23, 24],
                "1 annotations without a number as 'category_id' (left out): "
                "annotation 21 (image 5, 5.png)",
            )
            for category_id in (None, "0", 0.5, False, {}, -HUGE)
        ),
        (
            lambda c: c["annotations"].insert(0, "box"),
            [21, 22, 23, 24],
            "1 annotations without a number as 'image_id' (left out): annotations[0]",
        ),
        (
            lambda c: c["annotations"].append(dict(c["annotations"][0])),
            [21, 22, 23, 24],
            "1 annotations that are listed again (left out): annotation 21 (image 5, 5.png)",
        ),
    ],
)
def test_annotation_that_is_left_out(edit, kept, line):
    annotations, report = read(edit)
    assert report.lines() == [f"boxes.json: {line}"]
    assert kept_ids(annotations) == kept
    assert len(annotations.boxes) == len(kept)
    assert annotations.image_ids.tolist() == [2, 5, 7]


@pytest.mark.parametrize(
    ("edit", "column", "value", "line"),
    [
        *(
            (
                box(0, iscrowd=iscrowd),
                "crowds",
                0,
                "1 annotations with a malformed 'iscrowd' (0 is taken): "
                "annotation 21 (image 5, 5.png)",
            )
            for iscrowd in (2, -1, "yes", 0.5, NAN, [], HUGE)
        ),
        *(
            (
                box(0, area=area),
                "areas",
                12,
                "1 annotations with a malformed 'area' (width * height is taken): "
                "annotation 21 (image 5, 5.png)",
            )
            for area in (-1, "big", NAN, float("inf"), HUGE, True, [])
        ),
        *((box(0, iscrowd=iscrowd), "crowds", 1, None) for iscrowd in (1, 1.0, True)),
        *((box(0, iscrowd=iscrowd), "crowds", 0, None) for iscrowd in (None, 0, False)),
        (box(0, area=None), "areas", 12, None),
        (box(0, area=0), "areas", 0, None),
        (box(0, image_id=5.0, category_id=0.0), "labels", 0, None),
        (
            box(0, bbox=[-1, -1, 32, 32]),  # a pixel beyond each side
            "labels",
            0,
            None,
        ),
        *(
            (
                box(0, bbox=bbox),
                "labels",
                0,
                "1 boxes that reach over the edge of their image by more than a pixel (clipped): "
                "annotation 21 (image 5, 5.png)",
            )
            for bbox in ([-1.1, 0, 9, 9], [0, -1.1, 9, 9], [0, 0, 31.1, 9], [0, 0, 9, 31.1])
        ),
        (
            box(0, id=22),
            "labels",
            0,
            "1 annotations with the id of another one (kept): annotation 22 (image 2, 2.png)",
        ),
        *((box(0, id=i), "labels", 0, None) for i in (None, "21", [], HUGE)),
    ],
)
def test_annotation_that_is_kept(edit, column, value, line):
    annotations, report = read(edit)
    assert report.lines() == ([f"boxes.json: {line}"] if line else [])
    assert len(annotations.boxes) == 4
    row = annotations.starts[1]
    assert getattr(annotations, column)[row] == value
    written = copy.deepcopy(CONTENT)
    edit(written)
    assert annotations.boxes[row].tolist() == written["annotations"][0]["bbox"]  # not clipped


def test_boxes_of_an_image_of_unknown_size_are_outside_before_its_first_pixel_alone():
    annotations, report = read(image(1, height=None))
    assert report.lines() == []
    annotations, report = read(
        lambda c: (image(1, width="x")(c), box(0, bbox=[900, 0, 9, 9])(c)),
    )
    assert report.lines() == [
        "boxes.json: 1 images with a malformed 'width' (taken as unknown): image 5 (5.png)"
    ]
    assert annotations.sizes[1].tolist() == [30, 0]
    assert len(annotations.boxes) == 4

    annotations, report = read(box(2, bbox=[-9, 0, 9, 9]))
    assert report.lines() == [
        "boxes.json: 1 boxes outside of their image (left out): annotation 23 (image 7, 7.png)"
    ]
    assert kept_ids(annotations) == [21, 22, 24]


@pytest.mark.parametrize("value", [-4, 10.5, "10", True, [], HUGE])
def test_malformed_sizes_are_unknown(value):
    annotations, report = read(image(0, height=value))
    assert report.lines() == [
        "boxes.json: 1 images with a malformed 'height' (taken as unknown): image 2 (2.png)"
    ]
    assert annotations.sizes[0].tolist() == [0, 20]


LOST = "boxes.json: 1 annotations of images that cannot be used (left out): annotation 21 (image 5"


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        *(
            (
                image(1, file_name=name),
                "1 images without a 'file_name' (left out): image 5",
            )
            for name in (None, "", 5, ["5.png"], {})
        ),
        *(
            (
                image(1, file_name=name),
                "1 images whose 'file_name' leaves the image folder (left out): image 5 ",
            )
            for name in ("/etc/5.png", "../5.png", "a/../../5.png", "C:\\5.png", "x\0")
        ),
        (
            image(1, file_name="x" * 1025),
            "1 images without a 'file_name' (left out): image 5 (xxx",
        ),
    ],
)
def test_image_that_is_left_out(edit, line):
    annotations, report = read(edit)
    assert len(report.lines()) == 2
    assert report.lines()[0].startswith(f"boxes.json: {line}")
    assert report.lines()[1].startswith(LOST)
    assert annotations.image_ids.tolist() == [2, 7]
    assert kept_ids(annotations) == [22, 23, 24]


@pytest.mark.parametrize("image_id", [None, "5", 5.5, True, HUGE, [], {}])
def test_image_without_an_id_is_left_out(image_id):
    annotations, report = read(image(1, id=image_id))
    assert report.lines() == [
        "boxes.json: 1 images without a number as 'id' (left out): images[1] (5.png)",
        "boxes.json: 1 annotations of images that are not listed (left out): "
        "annotation 21 (image 5)",
    ]
    assert annotations.file_names.tolist() == ["2.png", "7.png"]


def test_annotations_need_no_ids():
    annotations, report = read(lambda c: [a.pop("id") for a in c["annotations"]])
    assert report.lines() == []
    assert kept_ids(annotations) == [21, 22, 23, 24]


def test_infinite_areas_beside_a_huge_one():
    annotations, report = read(
        lambda c: (box(0, area=HUGE)(c), box(1, area=float("inf"))(c), box(3, area=7)(c))
    )
    assert report.lines() == [
        "boxes.json: 2 annotations with a malformed 'area' (width * height is taken): "
        "annotation 21 (image 5, 5.png), annotation 22 (image 2, 2.png)"
    ]
    assert annotations.areas.tolist() == [200, 7, 12, 4]


def test_malformed_id_is_not_taken_for_another():
    _, report = read(lambda c: (image(1, id=None)(c), box(0, image_id=0)(c)))
    assert report.lines()[1:] == [
        "boxes.json: 1 annotations of images that are not listed (left out): "
        "annotation 21 (image 0)"
    ]


def test_entry_that_is_no_image():
    annotations, report = read(lambda c: c["images"].append(["2.png"]))
    assert report.lines() == ["boxes.json: 1 images without a number as 'id' (left out): images[3]"]
    assert len(annotations.image_ids) == 3


def test_image_that_is_listed_again():
    annotations, report = read(more("images", id=5, file_name="5.png", height=1, width=1))
    assert report.lines() == [
        "boxes.json: 1 images that are listed again (left out): image 5 (5.png)"
    ]
    assert annotations.sizes.tolist() == [[10, 20], [30, 30], [0, 0]]  # the first one's
    assert kept_ids(annotations) == [21, 22, 23, 24]


def test_images_of_one_id_that_name_different_files():
    annotations, report = read(more("images", id=5, file_name="other.png"))
    assert report.lines() == [
        "boxes.json: 2 images of one id that name different files (left out): "
        "image 5 (5.png), image 5 (other.png)",
        f"{LOST}, other.png)",
    ]
    assert annotations.image_ids.tolist() == [2, 7]
    assert kept_ids(annotations) == [22, 23, 24]


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("a.png", False),
        ("a/b/c.png", False),
        ("a/../b.png", False),
        ("a..b/..c.png", False),
        ("./a.png", False),
        ("a:b.png", True),
        ("ab:c.png", False),
        ("..", True),
        ("a/../..", True),
        ("./../a.png", True),
        ("a//../../b.png", True),
        ("..\\a.png", True),
        ("a\\..\\..\\b.png", True),
        ("a\\b/../../c.png", True),  # where a backslash is part of a name, this climbs
        ("\\\\host\\a.png", True),
        ("/a.png", True),
        ("a\0.png", True),
    ],
)
def test_names_that_leave_the_folder(name, leaves):
    assert leaves_folder(name) == leaves
