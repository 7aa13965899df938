# SPDX-License-Identifier: Apache-2.0
import errno
import os

import numpy as np
import pytest
from PIL import Image

from detr_fast.data.annotations import CocoAnnotations
from detr_fast.data.coco import CocoDetection
from detr_fast.data.validate import (
    DataReport,
    DatasetError,
    check_images,
    leave_out_missing_images,
    one_line,
)
from tests.data.coco_folder import official


def listed(names, size=None):
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
    for image in images:
        image.update(size or {})
    return CocoAnnotations.from_dict(
        {
            "images": images,
            "annotations": [
                {"image_id": image["id"], "category_id": 1, "bbox": [image["id"], 0, 1, 1]}
                for image in images
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
    )


def test_lines_of_a_report():
    report = DataReport("boxes.json")
    assert (len(report), report.lines()) == (0, [])
    report.add("kind a", [])
    report.add("kind b", ["one"])
    report.add("kind a", (str(i) for i in range(3)))
    report.add("kind b", ["two", "three", "four"])
    assert len(report) == 7
    assert report.lines() == [
        "boxes.json: 4 kind b: one, two, three, ...",
        "boxes.json: 3 kind a: 0, 1, 2",
    ]


def test_what_is_said_stays_on_one_line():
    report = DataReport("boxes\n.json")
    report.add("kind", ["\x1b[2Ja\ud800.png", "größe 5"])
    assert report.lines() == ["boxes\\n.json: 2 kind: \\x1b[2Ja\\ud800.png, größe 5"]
    assert str(DatasetError("a\r\nb")) == "a\\r\\nb"
    assert one_line("größe 5") == "größe 5"


def test_missing_images_are_left_out(tmp_path):
    for name in ("b.png", "sub/c.png", "sub/deep/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [
        "b.png",
        "a.png",
        "sub/c.png",
        "sub/b.png",
        "sub/deep/d.png",
        "none/e.png",
        "B.png",
        "./b.png",
        "sub/../b.png",
        "b.png/b.png",
        "sub/",
        "\ud800.png",
        "\ud800/b.png",
        "x" * 300 + "/b.png",
    ]
    report = DataReport("boxes.json")
    left = leave_out_missing_images(listed(names), tmp_path, report)
    kept = [1, 3, 5, 8, 9]
    assert left.image_ids.tolist() == kept
    assert left.file_names.tolist() == [names[i - 1] for i in kept]
    assert left.boxes[:, 0].tolist() == kept
    assert report.lines() == [
        "boxes.json: 9 images whose file is missing (left out): "
        "image 2 (a.png), image 4 (sub/b.png), image 6 (none/e.png), ..."
    ]


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    names = [f"{folder}/{i}.png" for i in range(20) for folder in "ab"]
    for folder in "ab":
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / name).touch()
    annotations, report, seen = listed(names), DataReport("boxes.json"), []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or scandir(path))
    assert leave_out_missing_images(annotations, tmp_path, report) is annotations
    assert sorted(seen) == [tmp_path / "a", tmp_path / "b"]
    assert len(report) == 0


def test_folder_without_one_of_the_images(tmp_path):
    report = DataReport("boxes.json")
    with pytest.raises(DatasetError) as caught:
        leave_out_missing_images(listed(["a.png", "b.png"]), tmp_path, report)
    assert str(caught.value) == (
        f"{tmp_path}: none of the 2 images of boxes.json is in it; looked first for "
        f"{tmp_path / 'a.png'}"
    )
    with pytest.raises(DatasetError, match="none: no such image folder"):
        leave_out_missing_images(listed(["a.png"]), tmp_path / "none", report)


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=r"sub: cannot be read \(Permission denied\)"):
        leave_out_missing_images(listed(["sub/a.png"]), tmp_path, DataReport("boxes.json"))


def test_every_image_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("detr_fast.data.validate.AHEAD", 4)  # several rounds
    rng = np.random.default_rng(0)
    for i in range(1, 10):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").unlink()
    whole = (tmp_path / "5.jpg").read_bytes()
    (tmp_path / "5.jpg").write_bytes(whole[:-200])  # the last rows of pixels
    (tmp_path / "6.jpg").write_bytes(b"")
    Image.new("RGB", (40, 60)).save(tmp_path / "9.jpg")

    annotations = listed([f"{i}.jpg" for i in range(1, 10)], {"height": 40, "width": 60})
    dataset = CocoDetection(tmp_path, annotations, None)
    report = DataReport("boxes.json")
    assert list(check_images(dataset, report, threads=3)) == list(range(9))
    missing, broken, other = report.lines()
    assert missing == ("boxes.json: 1 images whose file is missing: image 2 (2.jpg) is missing")
    assert broken.startswith(
        "boxes.json: 2 images that cannot be decoded: image 5 (5.jpg) cannot be decoded (image "
        "file is truncated"
    )
    assert other == (
        "boxes.json: 1 images of another size than the annotations say: "
        "image 9 (9.jpg) has 40 x 60 pixels, not 60 x 40"
    )
    assert len(dataset.unusable_report()) == 0  # a check decides nothing for training


def test_real_images_have_no_fault(test_data):
    dataset = official(test_data / "coco125", "val")
    report = DataReport("val")
    assert len(list(check_images(dataset, report))) == 66
    assert report.lines() == []
